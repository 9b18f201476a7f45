//! A store on S3 whose server refuses requests, loses them or their answers, is late, and cuts bodies short.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::child::{Ran, Trouble};
use crate::place::Place;
use crate::server::{Act, Fault, Kind, Nth, On, Server};
use crate::step::Step;

/// Steps of a round.
const STEPS: usize = 24;

static SERVER: LazyLock<Server> = LazyLock::new(Server::start);

/// The numbers of stores.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// Puts a place's store on the server.
pub fn go_there(place: &mut Place) {
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    place.store.lie_at(format!("s3://test/round-{number}"), SERVER.environment().into());
}

/// Meets most commands on a store with faults.
pub fn round(place: &mut Place) -> Result<(), Trouble> {
    let first = Step::Import { model: "a".into(), variant: place.rng.usize(..place.inputs.variants.len()) };
    for _ in 0..place.rng.usize(..3) {
        failing(place, &first.args(place.inputs))?;
    }
    place.begin_with(&first)?;
    for _ in 0..STEPS {
        let step = Step::random(&mut place.rng, &place.history, place.inputs);
        match place.rng.u8(..5) {
            0 => place.undisturbed(&step)?,
            _ => drop(place.attempt(&step, failing)?),
        }
        place.check(step.depth())?;
    }
    place.finish()
}

/// Runs a command some of whose requests fail.
fn failing(place: &mut Place, args: &[String]) -> Result<Ran, Trouble> {
    let faults = faults(place);
    SERVER.faults(faults);
    let ran = place.store.run(args);
    place.counts.faults += SERVER.met();
    SERVER.faults(vec![]);
    // What was sent and never answered may still be carried out.
    std::thread::sleep(LATER);
    ran
}

/// When the last of what is carried out later has been.
const LATER: Duration = Duration::from_millis(60);

fn faults(place: &mut Place) -> Vec<Fault> {
    let rng = &mut place.rng;
    let acts = [
        Act::Answer(409),
        Act::Answer(503),
        Act::Answer(500),
        Act::AnswerAfterApplying(503),
        Act::DieBefore,
        Act::DieAfter,
        Act::LateAnswer(Duration::from_millis(40)),
        Act::ApplyLater(Duration::from_millis(40)),
    ];
    let count = rng.usize(2..6);
    let mut all: Vec<Fault> = (0..count)
        .map(|_| {
            let kind = match rng.u8(..6) {
                0 => Kind::Manifest,
                1 => Kind::Data,
                2 => Kind::Tag,
                3 => Kind::Lease,
                4 => Kind::Writer,
                _ => Kind::Any,
            };
            let nth = match rng.bool() {
                true => Nth::Only(rng.u64(1..6)),
                false => Nth::Chance(rng.u64(..), 0.3),
            };
            Fault { on: On::Put(kind), nth, act: acts[rng.usize(..acts.len())] }
        })
        .collect();
    if rng.bool() {
        let act = match rng.u8(..4) {
            0 => Act::CutBody(rng.u64(..500)),
            1 => Act::Trickle(1 << 18),
            2 => Act::Answer(503),
            _ => Act::DieBefore,
        };
        let on = if rng.u8(..4) == 0 { On::List } else { On::Get(Kind::Any) };
        all.push(Fault { on, nth: Nth::Chance(rng.u64(..), 0.2), act });
    }
    if rng.u8(..4) == 0 {
        let act = if rng.bool() { Act::DieAfter } else { Act::Answer(503) };
        all.push(Fault { on: On::Delete, nth: Nth::Chance(rng.u64(..), 0.2), act });
    }
    all
}
