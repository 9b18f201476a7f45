//! gc on an object store, beside writers and readers, and processes that sleep.

use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use layerstore::layer::Layer;
use layerstore::testing::Hooks;
use layerstore::{Error, ErrorKind, Remedy, Store, StoreOptions};

use crate::numbered::{layer, options, put, sound, troubles};
use crate::s3::{Gate, Kind, On, Server};
use crate::support::{Place, assert_error};

/// How long a process that gives no sign of life is taken for alive here.
const LIFE: Duration = Duration::from_secs(1);

/// Opens or makes a store that waits for others as long as `LIFE`.
async fn opened(uri: &str, server: &Server) -> Store {
    let hooks = Hooks::with_lease_life(LIFE);
    Store::create_with(uri, StoreOptions { hooks, ..options(server) }).await.unwrap()
}

/// Does something again where the machine was so busy that this process was taken for dead meanwhile, as its user would.
async fn again<T, F: Future<Output = layerstore::Result<T>>>(mut work: impl FnMut() -> F) -> T {
    for _ in 0..20 {
        match work().await {
            Err(e) if e.kind() == ErrorKind::Conflict && e.to_string().contains("gave no sign of life") => {}
            done => return done.unwrap(),
        }
    }
    panic!("taken for dead again and again");
}

async fn loads(store: &Store, at: &str, (model, name, number): (&str, &str, u32)) {
    let at = store.at(at).await.unwrap();
    let loaded = at.layer(model, name).await.unwrap().load().await.unwrap();
    assert_eq!(loaded.to_parts().id(), layer(number).to_parts().id());
}

fn signal(child: &Child, name: &str) {
    let done = Command::new("kill").args([format!("-{name}"), child.id().to_string()]).status().unwrap();
    assert!(done.success());
}

/// Waits until the gate holds a request of a child, and stops the child; `false` where it has ended before.
fn stopped_at(gate: &Gate, child: &mut Child) -> bool {
    while gate.held() == 0 {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    signal(child, "STOP");
    true
}

/// Writers go on while gc collects again and again, requests fail, and readers read a version that is kept: nothing acknowledged is lost,
/// and no reader fails.
#[test]
fn gc_beside_writers_and_readers() {
    const WRITERS: u32 = 4;
    const EACH: u32 = 12;
    let server = Server::start();
    let uri = "s3://test/collected";
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let store = opened(uri, &server).await;
        put(&store, "kept", "layer", 1).await.unwrap();
        put(&store, "kept", "other", 2).await.unwrap();
        store.create_snapshot("kept").await.unwrap();
        store.remove_model("kept").await.unwrap();
        server.faults(troubles(300, Kind::Any));
        let done = Arc::new(AtomicBool::new(false));
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let server = server.clone();
                tokio::spawn(async move {
                    let store = opened(uri, &server).await;
                    for i in 0..EACH {
                        // Each replaces the one before: gc has something to remove. Some come back that it may just remove.
                        let model = format!("m{writer}");
                        again(|| put(&store, &model, "layer", 100 * writer + i % 4)).await;
                    }
                })
            })
            .collect();
        let readers: Vec<_> = (0..2)
            .map(|_| {
                let (server, done) = (server.clone(), done.clone());
                tokio::spawn(async move {
                    let mut reads = 0;
                    loop {
                        let store = opened(uri, &server).await;
                        loads(&store, "kept", ("kept", "layer", 1)).await;
                        loads(&store, "kept", ("kept", "other", 2)).await;
                        reads += 1;
                        tokio::time::sleep(Duration::from_millis(20)).await;
                        if reads >= 5 && done.load(Ordering::Relaxed) {
                            return reads;
                        }
                    }
                })
            })
            .collect();
        let collector = {
            let (server, done) = (server.clone(), done.clone());
            tokio::spawn(async move {
                let store = opened(uri, &server).await;
                let mut removed = 0;
                loop {
                    removed += again(|| store.gc(Duration::ZERO, true)).await.artifacts;
                    if done.load(Ordering::Relaxed) {
                        return removed;
                    }
                }
            })
        };
        for writer in writers {
            writer.await.unwrap();
        }
        done.store(true, Ordering::Relaxed);
        for reader in readers {
            assert!(reader.await.unwrap() >= 5);
        }
        let removed = collector.await.unwrap();
        assert!(removed > 0, "gc has had something to remove");
        server.faults(vec![]);
        for writer in 0..WRITERS {
            loads(&store, "latest", (&format!("m{writer}"), "layer", 100 * writer + (EACH - 1) % 4)).await;
        }
        loads(&store, "kept", ("kept", "layer", 1)).await;
        store.gc(Duration::ZERO, true).await.unwrap();
        sound(&store).await;
        // Two of the snapshot, and one of each writer.
        assert_eq!(store.latest().await.unwrap().records().await.unwrap().len(), WRITERS as usize);
        let writers = server.objects().into_keys().filter(|key| key.contains("layerstore.writers/")).count();
        assert_eq!(writers, 0, "all have signed out");
    });
}

/// A gc that was stopped at each of its changes is taken for dead; what it does when it goes on harms nothing that came to be meanwhile.
#[test]
fn a_gc_that_slept_removes_nothing_that_came_meanwhile() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut stops = 0;
    for change in [1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20] {
        let server = Server::start();
        let place = Place::on_s3(&server);
        let uri = place.store();
        runtime.block_on(async {
            let store = opened(&uri, &server).await;
            put(&store, "m", "layer", 1).await.unwrap();
            put(&store, "m", "layer", 2).await.unwrap();
            put(&store, "m", "stays", 3).await.unwrap();
            put(&store, "m", "layer", 4).await.unwrap();
            let gate = server.pause_only(On::Change, change);
            let mut gc = place.spawn(&["gc", "--older-than", "0s", "--apply"]);
            let stopped = stopped_at(&gate, &mut gc);
            stops += u32::from(stopped);
            if stopped {
                // What it is about to remove comes back, and a version that it may be about to remove is to be named.
                put(&store, "back", "layer", 1).await.unwrap();
                let named = store.create_snapshot_at("old", "3").await;
                gate.release();
                signal(&gc, "CONT");
                let ended = gc.wait_with_output().unwrap();
                let said = String::from_utf8_lossy(&ended.stderr);
                assert!(
                    ended.status.success() || said.contains("another has taken its lease over"),
                    "{change}: {said}"
                );
                if named.is_ok() {
                    loads(&store, "old", ("m", "layer", 2)).await;
                }
                loads(&store, "latest", ("back", "layer", 1)).await;
            } else {
                drop(gate);
                assert!(gc.wait().unwrap().success());
            }
            loads(&store, "latest", ("m", "layer", 4)).await;
            loads(&store, "latest", ("m", "stays", 3)).await;
            sound(&store).await;
            store.gc(Duration::ZERO, true).await.unwrap();
            sound(&store).await;
            loads(&store, "latest", ("m", "stays", 3)).await;
        });
    }
    assert!(stops >= 8, "{stops}");
}

/// A writer that was stopped at each of its changes is taken for dead by gc: it commits nothing when it goes on, or what is whole.
#[test]
fn a_writer_that_slept_commits_nothing_that_was_collected() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (mut stops, mut refused) = (0, 0);
    for change in [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14] {
        let server = Server::start();
        let place = Place::on_s3(&server);
        let uri = place.store();
        place.import("first", None);
        place.json(&["remove", "first"]);
        runtime.block_on(async {
            let store = opened(&uri, &server).await;
            let gate = server.pause_only(On::Change, change);
            let mut import = place.spawn(&["import", crate::support::CHECKPOINT, "--model", "m"]);
            if stopped_at(&gate, &mut import) {
                stops += 1;
                store.gc(Duration::ZERO, true).await.unwrap();
                gate.release();
                signal(&import, "CONT");
                let ended = import.wait_with_output().unwrap();
                let said = String::from_utf8_lossy(&ended.stderr);
                assert!(ended.status.success() || said.contains("gave no sign of life"), "{change}: {said}");
                refused += u32::from(!ended.status.success());
            } else {
                drop(gate);
                assert!(import.wait().unwrap().success());
            }
            sound(&store).await;
            place.import("m", None);
            sound(&store).await;
            store.gc(Duration::ZERO, true).await.unwrap();
            sound(&store).await;
        });
        assert_eq!(place.json(&["models"]).as_array().unwrap().len(), 1);
    }
    assert!(stops >= 5 && refused >= 2, "{stops} {refused}");
}

/// gc waits for a writer that is alive, and says so; one that gives no sign of life is passed over.
#[test]
fn gc_tells_the_living_from_the_dead() {
    let server = Server::start();
    let uri = "s3://test/living";
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let store = opened(uri, &server).await;
        put(&store, "m", "layer", 1).await.unwrap();
        put(&store, "m", "layer", 2).await.unwrap();
        // A sign of life that nobody renews.
        server.set("test/living/layerstore.writers/dead.json", Some(b"{}".to_vec()));
        assert_eq!(store.gc(Duration::ZERO, true).await.unwrap().artifacts, 1);
        assert!(!server.objects().contains_key("test/living/layerstore.writers/dead.json"));
        let lease = store.lease().await.unwrap();
        let busy = store.gc(Duration::ZERO, true).await.unwrap_err();
        assert_error(&busy, ErrorKind::Conflict, &["an import is writing to it"]);
        // It has given up: writers go on, and gc after them.
        put(&store, "m", "layer", 3).await.unwrap();
        drop(lease);
        assert_eq!(store.gc(Duration::ZERO, true).await.unwrap().artifacts, 1);
        // A lease that holds something else is no lease.
        server.set("test/living/layerstore.lease.json", Some(b"nothing".to_vec()));
        let damaged = put(&store, "m", "layer", 4).await.unwrap_err();
        assert_error(&damaged, ErrorKind::Corrupt, &["layerstore.lease.json"]);
        assert!(matches!(store.gc(Duration::ZERO, true).await, Err(Error::Damaged { .. })));
        loads(&store, "latest", ("m", "layer", 3)).await;
        let report = store.verify(|_, _| ()).await.unwrap();
        let [found] = &report.damaged[..] else { panic!("{report:?}") };
        assert!(found.file.ends_with("/living/layerstore.lease.json"), "{found:?}");
        assert_eq!((found.reason.contains("no lease"), &found.help[..]), (true, &[Remedy::DeleteFile][..]));
        server.set("test/living/layerstore.lease.json", None);
        assert!(store.verify(|_, _| ()).await.unwrap().is_sound());
        put(&store, "m", "layer", 4).await.unwrap();
    });
}
