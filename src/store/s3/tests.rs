//! The server, and the client against it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{self, StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{
    Error, GetOptions, GetRange, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions,
    PutPayload, RetryConfig, UpdateVersion,
};

use self::server::{Act, Fault, KEY_ID, Kind, Nth, On, SECRET, Server};
use super::careful::{Careful, Unclear};
use super::http::Connector;
use super::options::{self, StorageOptions, client};

#[path = "../../../tests/all/s3/mod.rs"]
#[allow(dead_code)]
mod server;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// A client that repeats, and one that does not.
fn clients(server: &Server, idle: Duration) -> (object_store::aws::AmazonS3, object_store::aws::AmazonS3) {
    let connector = Connector::with_idle(idle);
    let mut retry = RetryConfig::default();
    retry.backoff.init_backoff = ms(5);
    retry.backoff.max_backoff = ms(50);
    let once = RetryConfig { max_retries: 0, ..retry.clone() };
    let make = |retry| client("b", server.environment(), &StorageOptions::new(), &connector, retry).unwrap();
    (make(retry), make(once))
}

fn careful(server: &Server) -> Careful {
    let (store, once) = clients(server, Duration::from_secs(2));
    Careful::new(Arc::new(store), Arc::new(once))
}

fn fault(on: On, nth: Nth, act: Act) -> Fault {
    Fault { on, nth, act }
}

fn created() -> PutOptions {
    PutMode::Create.into()
}

async fn names(store: &dyn ObjectStore, prefix: Option<&str>) -> Vec<String> {
    let prefix = prefix.map(Path::from);
    store.list(prefix.as_ref()).map_ok(|meta| meta.location.to_string()).try_collect().await.unwrap()
}

/// All that the plain client does, without faults.
#[tokio::test]
async fn requests() {
    let server = Server::start();
    server.page(3);
    let (s3, _) = clients(&server, Duration::from_secs(2));
    let odd = Path::from("a b/ü+&<'\">%25 c=d?e#f");
    let put = s3.put(&odd, "odd".into()).await.unwrap();
    let got = s3.get(&odd).await.unwrap();
    assert_eq!(got.meta.e_tag, put.e_tag);
    assert!(got.meta.last_modified.timestamp() > 1_700_000_000);
    assert_eq!(got.bytes().await.unwrap(), "odd");
    assert_eq!(names(&s3, Some("a b")).await, [odd.to_string()]);

    // Conditions.
    let at = Path::from("t/x");
    let first = s3.put_opts(&at, "1".into(), created()).await.unwrap();
    let error = s3.put_opts(&at, "2".into(), created()).await.unwrap_err();
    assert!(matches!(error, Error::AlreadyExists { .. }), "{error:?}");
    let update = |put: &object_store::PutResult| PutOptions::from(PutMode::Update(put.clone().into()));
    let second = s3.put_opts(&at, "22".into(), update(&first)).await.unwrap();
    let error = s3.put_opts(&at, "3".into(), update(&first)).await.unwrap_err();
    assert!(matches!(error, Error::Precondition { .. }), "{error:?}");
    let error = s3.put_opts(&Path::from("none"), "3".into(), update(&first)).await.unwrap_err();
    assert!(matches!(error, Error::Precondition { .. }), "{error:?}");
    let get = |if_match: &Option<String>| GetOptions { if_match: if_match.clone(), ..GetOptions::default() };
    assert_eq!(s3.get_opts(&at, get(&second.e_tag)).await.unwrap().meta.size, 2);
    assert!(matches!(s3.get_opts(&at, get(&first.e_tag)).await, Err(Error::Precondition { .. })));
    let unless = GetOptions { if_none_match: second.e_tag.clone(), ..GetOptions::default() };
    assert!(matches!(s3.get_opts(&at, unless).await, Err(Error::NotModified { .. })));

    // Ranges.
    let all: Vec<u8> = (0..100).collect();
    let at = Path::from("t/ranges");
    s3.put(&at, all.clone().into()).await.unwrap();
    assert_eq!(s3.get_range(&at, 10..20).await.unwrap(), all[10..20]);
    assert_eq!(s3.get_ranges(&at, &[0..5, 90..100]).await.unwrap()[1], all[90..]);
    for (range, expected) in
        [(GetRange::Suffix(7), 93..100), (GetRange::Offset(60), 60..100), (GetRange::Suffix(700), 0..100)]
    {
        let options = GetOptions { range: Some(range), ..GetOptions::default() };
        let got = s3.get_opts(&at, options).await.unwrap();
        assert_eq!((got.range.clone(), got.meta.size), (expected.start as u64..expected.end as u64, 100));
        assert_eq!(got.bytes().await.unwrap(), all[expected]);
    }
    assert!(s3.get_range(&at, 100..101).await.unwrap_err().to_string().contains("416"));
    assert_eq!(s3.head(&at).await.unwrap().size, 100);
    assert!(matches!(s3.head(&Path::from("none")).await, Err(Error::NotFound { .. })));
    assert!(matches!(s3.get(&Path::from("none")).await, Err(Error::NotFound { .. })));

    // Copies and uploads in parts.
    let to = Path::from("t/copy");
    s3.copy(&at, &to).await.unwrap();
    assert_eq!(s3.get(&to).await.unwrap().bytes().await.unwrap(), all);
    let mut upload = s3.put_multipart(&to).await.unwrap();
    let parts = [upload.put_part("one ".into()), upload.put_part("two".into())];
    futures::future::try_join_all(parts).await.unwrap();
    assert_eq!(server.unfinished_uploads(), 1);
    let put = upload.complete().await.unwrap();
    assert_eq!(s3.get(&to).await.unwrap().meta.e_tag, put.e_tag);
    assert_eq!(s3.get(&to).await.unwrap().bytes().await.unwrap(), "one two");
    let mut upload = s3.put_multipart(&to).await.unwrap();
    upload.put_part("lost".into()).await.unwrap();
    upload.abort().await.unwrap();
    assert_eq!(server.unfinished_uploads(), 0);

    // Listings and deletions.
    for name in ["l/1", "l/2", "l/d/1", "l/d/2", "l/d/3", "l/d/4", "l/e/1", "l/z", "l0"] {
        s3.put(&Path::from(name), name.into()).await.unwrap();
    }
    assert_eq!(names(&s3, Some("l")).await, ["l/1", "l/2", "l/d/1", "l/d/2", "l/d/3", "l/d/4", "l/e/1", "l/z"]);
    let after = s3.list_with_offset(Some(&Path::from("l")), &Path::from("l/d/3"));
    let after: Vec<ObjectMeta> = after.try_collect().await.unwrap();
    assert_eq!(after.iter().map(|meta| meta.location.as_ref()).collect::<Vec<_>>(), ["l/d/4", "l/e/1", "l/z"]);
    let listed = s3.list_with_delimiter(Some(&Path::from("l"))).await.unwrap();
    assert_eq!(listed.objects.iter().map(|meta| meta.location.as_ref()).collect::<Vec<_>>(), ["l/1", "l/2", "l/z"]);
    assert_eq!(listed.common_prefixes, [Path::from("l/d"), Path::from("l/e")]);
    let top = s3.list_with_delimiter(None).await.unwrap();
    assert_eq!(top.common_prefixes, [Path::from("a b"), Path::from("l"), Path::from("t")]);
    s3.delete(&odd).await.unwrap();
    let all = stream::iter(names(&s3, None).await).map(|name| Ok(Path::from(name))).boxed();
    assert_eq!(s3.delete_stream(all).try_collect::<Vec<_>>().await.unwrap().len(), 12);
    assert!(server.objects().is_empty());

    // What the log says, and that the secret is nowhere.
    let log = server.log();
    assert!(log.iter().all(|seen| seen.answered.unwrap() >= seen.arrived && seen.status != 0));
    assert!(
        log.iter().any(|seen| seen.range.as_deref() == Some("bytes=10-19") && seen.sent == 10 && seen.status == 206)
    );
    let heads = String::from_utf8(server.heads()).unwrap();
    assert!(heads.contains(KEY_ID) && !heads.contains(SECRET));
    assert!(!heads.contains("aws-chunked") && !heads.to_lowercase().contains("transfer-encoding"));
    // One after the other: as deep as there are requests. All over few connections.
    assert!(server.round_trips() >= log.len() - 3, "{} of {}", server.round_trips(), log.len());
    assert!(log.iter().map(|seen| seen.connection).max().unwrap() < 8);
}

#[tokio::test]
async fn strangers_are_refused() {
    let server = Server::start();
    let options = StorageOptions::new().with("access_key_id", "stranger").with("secret_access_key", "marked-secret");
    let s3 = client("b", server.environment(), &options, &Connector::default(), RetryConfig::default()).unwrap();
    let s3 = Careful::new(Arc::new(s3.clone()), Arc::new(s3));
    for error in [
        s3.get(&Path::from("x")).await.map(drop).unwrap_err(),
        s3.head(&Path::from("x")).await.map(drop).unwrap_err(),
        s3.put_opts(&Path::from("x"), "x".into(), created()).await.map(drop).unwrap_err(),
    ] {
        assert!(matches!(error, Error::PermissionDenied { .. }), "{error:?}");
        assert!(!format!("{error:?} {error}").contains("marked-secret"));
    }
    assert!(server.objects().is_empty());
}

/// Parallel requests are one round trip; a gate holds requests.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn round_trips_and_gates() {
    let server = Server::start();
    let s3 = careful(&server);
    s3.put(&Path::from("x"), "x".into()).await.unwrap();
    server.latency(ms(20));
    server.clear_log();
    let x = Path::from("x");
    for _ in 0..3 {
        futures::future::try_join_all((0..8).map(|_| s3.get(&x))).await.unwrap();
    }
    assert_eq!(server.log().len(), 24);
    assert_eq!(server.round_trips(), 3);

    let gate = server.pause(On::Put(Kind::With("held".into())));
    let put = tokio::spawn({
        let s3 = s3.clone();
        async move { s3.put_opts(&Path::from("held"), "late".into(), created()).await }
    });
    tokio::task::spawn_blocking(move || {
        gate.wait_for(1);
        assert_eq!(gate.held(), 1);
        gate
    })
    .await
    .map(|gate| {
        assert!(!server.objects().contains_key("b/held"));
        server.set("b/held", Some(b"early".to_vec()));
        gate.release();
    })
    .unwrap();
    assert!(matches!(put.await.unwrap(), Err(Error::AlreadyExists { .. })));
}

/// The acts that a put can meet.
fn bad_puts() -> Vec<(&'static str, Act)> {
    vec![
        ("409", Act::Answer(409)),
        ("412", Act::Answer(412)),
        ("429", Act::Answer(429)),
        ("500", Act::Answer(500)),
        ("503", Act::Answer(503)),
        ("503 after", Act::AnswerAfterApplying(503)),
        ("409 after", Act::AnswerAfterApplying(409)),
        ("412 after", Act::AnswerAfterApplying(412)),
        ("late", Act::Late(ms(60))),
        ("late answer", Act::LateAnswer(ms(60))),
        ("die before", Act::DieBefore),
        ("die after", Act::DieAfter),
        ("later", Act::ApplyLater(ms(5))),
        ("much later", Act::ApplyLater(ms(150))),
    ]
}

/// One of many that make the same object wins, whatever the server does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_creation_wins() {
    for (name, act) in bad_puts() {
        for (round, nth) in [Nth::First(1), Nth::First(6), Nth::Every(2), Nth::Chance(7, 0.5)].into_iter().enumerate() {
            let server = Server::start();
            server.faults(vec![fault(On::Put(Kind::Any), nth, act)]);
            let (s3, at) = (careful(&server), Path::from("t/_versions/1.manifest"));
            let tasks = (0..8).map(|task| {
                let (s3, at) = (s3.clone(), at.clone());
                tokio::spawn(async move { s3.put_opts(&at, format!("by {task}").into(), created()).await })
            });
            let mut winners = vec![];
            for (task, result) in futures::future::join_all(tasks).await.into_iter().enumerate() {
                match result.unwrap() {
                    Ok(put) => winners.push((task, put.e_tag)),
                    Err(Error::AlreadyExists { .. }) => {}
                    Err(e) => panic!("{name} {round}: {e:?}"),
                }
            }
            assert_eq!(winners.len(), 1, "{name} {round}");
            // What was to be applied later changes nothing.
            tokio::time::sleep(ms(if name == "much later" { 250 } else { 10 })).await;
            let there = s3.get(&at).await.unwrap();
            assert_eq!(there.meta.e_tag, winners[0].1, "{name} {round}");
            assert_eq!(there.bytes().await.unwrap(), format!("by {}", winners[0].0), "{name} {round}");
        }
    }
}

/// A lone creation whose answer is lost has come about; one that was refused for no reason is made again.
#[tokio::test]
async fn lost_answers_of_creations() {
    for (name, act) in bad_puts() {
        let server = Server::start();
        server.faults(vec![fault(On::Put(Kind::Tag), Nth::First(2), act)]);
        let s3 = careful(&server);
        let put = s3.put_opts(&Path::from("t/_refs/tags/a"), "mine".into(), created()).await;
        assert!(put.is_ok(), "{name}: {put:?}");
        assert_eq!(**server.objects()["b/t/_refs/tags/a"], *b"mine", "{name}");
        let error = s3.put_opts(&Path::from("t/_refs/tags/a"), "yours".into(), created()).await.unwrap_err();
        assert!(matches!(error, Error::AlreadyExists { .. }), "{name}: {error:?}");
    }
}

/// What a server says that it does not have is not asked for again.
#[tokio::test]
async fn what_a_server_lacks_is_said_at_once() {
    let server = Server::start();
    let s3 = careful(&server).with_limit(ms(300_000));
    let x = Path::from("x");
    server.faults(vec![fault(On::Any, Nth::Every(1), Act::Answer(501))]);
    let put = s3.put_opts(&x, "mine".into(), created()).await.unwrap_err();
    let over = s3.put_opts(&x, "mine".into(), PutMode::Overwrite.into()).await.unwrap_err();
    let listed = s3.list(None).try_collect::<Vec<_>>().await.unwrap_err();
    for (error, method) in [(put, "PUT"), (over, "PUT"), (listed, "GET")] {
        assert!(Unclear::of(&error).is_none(), "{error:?}");
        let causes = std::iter::successors(std::error::Error::source(&error), |e| e.source());
        let said: Vec<String> = causes.map(|e| e.to_string()).collect();
        assert!(said.iter().any(|e| e.contains(&format!("answered a {method} with 501"))), "{said:?}");
    }
    assert_eq!(server.met(), 3);
}

/// A store that answers 409 to all creations holds nothing, and it is not said that it does.
#[tokio::test]
async fn nothing_is_said_that_is_not_known() {
    let server = Server::start();
    let s3 = careful(&server).with_limit(ms(300));
    let x = Path::from("x");
    for act in [Act::Answer(409), Act::Answer(412), Act::Answer(503), Act::DieBefore] {
        server.faults(vec![fault(On::Put(Kind::Any), Nth::Every(1), act)]);
        let error = s3.put_opts(&x, "mine".into(), created()).await.unwrap_err();
        assert!(!Unclear::of(&error).unwrap().is_superseded(), "{error:?}");
    }
    // Nor where the object cannot be read.
    server.faults(vec![
        fault(On::Put(Kind::Any), Nth::Every(1), Act::DieAfter),
        fault(On::Get(Kind::Any), Nth::Every(1), Act::Answer(503)),
    ]);
    let error = s3.put_opts(&x, "mine".into(), created()).await.unwrap_err();
    assert!(Unclear::of(&error).is_some(), "{error:?}");
    // An update whose answer is lost, and which another has followed.
    server.faults(vec![]);
    server.set("b/x", Some(b"0".to_vec()));
    let first = s3.head(&x).await.unwrap();
    server.faults(vec![fault(On::Put(Kind::Any), Nth::First(1), Act::DieAfter)]);
    let gate = server.pause(On::Get(Kind::Any));
    let put = tokio::spawn({
        let (s3, x) = (s3.clone(), x.clone());
        let mode = PutMode::Update(UpdateVersion { e_tag: first.e_tag.clone(), version: None });
        async move { s3.put_opts(&x, "mine".into(), mode.into()).await }
    });
    let gate = tokio::task::spawn_blocking(move || {
        gate.wait_for(1);
        gate
    });
    let gate = gate.await.unwrap();
    server.set("b/x", Some(b"theirs".to_vec()));
    gate.release();
    let error = put.await.unwrap().unwrap_err();
    assert!(Unclear::of(&error).unwrap().is_superseded(), "{error:?}");
    // Without a lost answer it is plain.
    server.faults(vec![]);
    let mode = PutMode::Update(UpdateVersion { e_tag: first.e_tag, version: None });
    assert!(matches!(s3.put_opts(&x, "mine".into(), mode.into()).await, Err(Error::Precondition { .. })));
}

/// Adds to a counter until it is certain that it was added once. The counter is the list of what was added.
async fn add(s3: &Careful, at: &Path, mine: &str, lies: bool) {
    let mut refused = false;
    loop {
        let got = s3.get(at).await.unwrap();
        let version = UpdateVersion { e_tag: got.meta.e_tag.clone(), version: None };
        let mut all = String::from_utf8(got.bytes().await.unwrap().to_vec()).unwrap();
        if all.lines().any(|line| line == mine) {
            assert!(!refused || lies, "{mine} was added, though it was said to be refused");
            return;
        }
        all.push_str(mine);
        all.push('\n');
        refused = false;
        match s3.put_opts(at, all.into(), PutMode::Update(version).into()).await {
            Ok(_) => return,
            Err(Error::Precondition { .. }) => refused = true,
            // It may be in the list.
            Err(e) if Unclear::of(&e).is_some_and(Unclear::is_superseded) => {}
            Err(e) => panic!("{e:?}"),
        }
    }
}

/// A put without a condition that is refused while another request is under way is made again.
#[tokio::test]
async fn plain_puts_are_made_again() {
    let server = Server::start();
    let (s3, x) = (careful(&server), Path::from("x"));
    for act in [Act::Answer(409), Act::Answer(412), Act::AnswerAfterApplying(409)] {
        server.faults(vec![fault(On::Put(Kind::Any), Nth::First(2), act)]);
        s3.put(&x, format!("{act:?}").into()).await.unwrap();
        assert_eq!(*server.objects()["b/x"], format!("{act:?}").into_bytes());
    }
}

/// Nothing is lost and nothing is added twice: 8 tasks add 20 each.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn counters() {
    for (name, act) in bad_puts() {
        let server = Server::start();
        server.set("b/counter", Some(vec![]));
        server.faults(vec![fault(On::Put(Kind::Any), Nth::Chance(1, 0.3), act)]);
        let (s3, at) = (careful(&server), Path::from("counter"));
        // A server that refuses what it did: no S3 is so, and it is not seen through.
        let lies = ["409 after", "412 after"].contains(&name);
        let tasks = (0..8).map(|task| {
            let (s3, at) = (s3.clone(), at.clone());
            tokio::spawn(async move {
                for round in 0..20 {
                    add(&s3, &at, &format!("{task}.{round}"), lies).await;
                }
            })
        });
        futures::future::try_join_all(tasks).await.unwrap();
        tokio::time::sleep(ms(if name == "much later" { 250 } else { 10 })).await;
        let all = server.objects()["b/counter"].clone();
        let mut counted = BTreeMap::<&str, usize>::new();
        std::str::from_utf8(&all).unwrap().lines().for_each(|line| *counted.entry(line).or_default() += 1);
        assert_eq!(counted.len(), 160, "{name}");
        assert!(counted.values().all(|&count| count == 1), "{name}: {counted:?}");
    }
}

/// Uploads in parts come about though answers are lost, and are not said to where they do not.
#[tokio::test]
async fn uploads_in_parts() {
    let part = |byte: u8| PutPayload::from(vec![byte; 700_000]);
    let acts = [
        ("503", Act::Answer(503)),
        ("503 after", Act::AnswerAfterApplying(503)),
        ("404 after", Act::AnswerAfterApplying(404)),
        ("die before", Act::DieBefore),
        ("die after", Act::DieAfter),
        ("cut", Act::CutBody(20)),
        ("later", Act::ApplyLater(ms(30))),
        ("late answer", Act::LateAnswer(ms(50))),
    ];
    for (name, act) in acts {
        let server = Server::start();
        let s3 = careful(&server);
        server.faults(vec![
            fault(On::Complete(Kind::Data), Nth::First(1), act),
            fault(On::Put(Kind::Data), Nth::Only(2), if name == "404 after" { Act::DieAfter } else { act }),
        ]);
        let at = Path::from("t/data/1.lance");
        let mut upload = s3.put_multipart(&at).await.unwrap();
        let parts = [upload.put_part(part(1)), upload.put_part(part(2)), upload.put_part("end".into())];
        futures::future::try_join_all(parts).await.unwrap();
        let put = upload.complete().await.unwrap_or_else(|e| panic!("{name}: {e:?}"));
        let there = s3.get(&at).await.unwrap();
        assert_eq!(there.meta.e_tag, put.e_tag, "{name}");
        let bytes = there.bytes().await.unwrap();
        assert_eq!((bytes.len(), bytes[699_999], bytes[700_000]), (1_400_003, 1, 2), "{name}");
    }
    let server = Server::start();
    let s3 = careful(&server);
    server.faults(vec![fault(On::Complete(Kind::Any), Nth::Every(1), Act::Answer(404))]);
    let mut upload = s3.put_multipart(&Path::from("t/data/1.lance")).await.unwrap();
    upload.put_part("part".into()).await.unwrap();
    assert!(matches!(upload.complete().await, Err(Error::NotFound { .. })));
    upload.abort().await.unwrap();
    assert_eq!(server.unfinished_uploads(), 0);
}

/// Reads give the right bytes, or an error.
#[tokio::test]
async fn reads() {
    let server = Server::start();
    let s3 = careful(&server);
    let bytes: Vec<u8> = (0..1_000_000_u32).map(|i| (i * 7 / 3) as u8).collect();
    let at = Path::from("t/data/1.lance");
    s3.put(&at, bytes.clone().into()).await.unwrap();
    let acts = [
        Act::CutBody(0),
        Act::CutBody(300_000),
        Act::Trickle(8_000_000),
        Act::Answer(503),
        Act::Answer(429),
        Act::DieBefore,
        Act::Late(ms(50)),
        Act::LateAnswer(ms(50)),
    ];
    for act in acts {
        let set = || server.faults(vec![fault(On::Get(Kind::Data), Nth::First(3), act)]);
        set();
        assert_eq!(s3.get(&at).await.unwrap().bytes().await.unwrap(), bytes, "{act:?}");
        set();
        assert_eq!(s3.get_range(&at, 1000..500_000).await.unwrap(), bytes[1000..500_000], "{act:?}");
        set();
        let ranges = s3.get_ranges(&at, &[0..10, 999_000..1_000_000]).await.unwrap();
        assert_eq!((&ranges[0][..], &ranges[1][..]), (&bytes[..10], &bytes[999_000..]), "{act:?}");
        set();
        assert_eq!(s3.head(&at).await.unwrap().size, 1_000_000, "{act:?}");
    }
    // Always cut.
    server.faults(vec![fault(On::Get(Kind::Data), Nth::Every(1), Act::CutBody(10))]);
    let error = s3.get(&at).await.unwrap().bytes().await.unwrap_err();
    assert!(matches!(error, Error::Generic { .. }), "{error:?}");
    // The object is another one when the read goes on.
    server.faults(vec![fault(On::Get(Kind::Data), Nth::First(1), Act::CutBody(10))]);
    let read = s3.get(&at).await.unwrap();
    server.set("b/t/data/1.lance", Some(vec![1; 1_000_000]));
    assert!(read.bytes().await.is_err());
}

#[tokio::test]
async fn listings_and_deletions() {
    let acts = [
        Act::Answer(503),
        Act::AnswerAfterApplying(500),
        Act::DieBefore,
        Act::DieAfter,
        Act::CutBody(200),
        Act::Late(ms(20)),
        Act::LateAnswer(ms(20)),
        Act::ApplyLater(ms(10)),
    ];
    for act in acts {
        for nth in [Nth::First(2), Nth::Every(3), Nth::Only(4)] {
            let server = Server::start();
            let s3 = careful(&server);
            server.page(4);
            let all: Vec<String> = (0..30).map(|i| format!("l/{}/{i:02}", i / 10)).collect();
            all.iter().for_each(|name| server.set(&format!("b/{name}"), Some(name.as_bytes().to_vec())));
            server.faults(vec![fault(On::List, nth, act), fault(On::Delete, nth, act)]);
            assert_eq!(names(&s3, Some("l")).await, all, "{act:?} {nth:?}");
            assert_eq!(names(&s3, Some("l/1")).await, all[10..20], "{act:?} {nth:?}");
            let after = s3.list_with_offset(Some(&Path::from("l")), &Path::from("l/1/15"));
            assert_eq!(after.try_collect::<Vec<_>>().await.unwrap().len(), 14);
            assert_eq!(s3.list_with_delimiter(Some(&Path::from("l"))).await.unwrap().common_prefixes.len(), 3);
            for name in &all[..5] {
                s3.delete(&Path::from(name.as_str())).await.unwrap();
            }
            // Those that are gone, too.
            let keys: Vec<Path> = all.iter().map(|name| Path::from(name.as_str())).collect();
            let deleted: Vec<Path> =
                s3.delete_stream(stream::iter(keys.clone()).map(Ok).boxed()).try_collect().await.unwrap();
            assert_eq!(deleted, keys);
            assert!(server.objects().is_empty(), "{act:?} {nth:?}");
        }
    }
}

/// A server that stops is noticed, one that is slow is waited for, however long it takes.
#[tokio::test]
async fn idle_connections() {
    let server = Server::start();
    let (s3, once) = clients(&server, ms(150));
    let (at, bytes) = (Path::from("t/data/1"), vec![3; 200_000]);
    s3.put(&at, bytes.clone().into()).await.unwrap();
    server.faults(vec![fault(On::Get(Kind::Any), Nth::Every(1), Act::Trickle(400_000))]);
    assert_eq!(once.get(&at).await.unwrap().bytes().await.unwrap(), bytes);
    server.faults(vec![fault(On::Any, Nth::Every(1), Act::LateAnswer(ms(800)))]);
    let error = once.get(&at).await.unwrap_err();
    assert!(error.to_string().contains("nothing was sent or received for 150ms"), "{error}");
    let error = once.put(&at, bytes.into()).await.unwrap_err();
    assert!(error.to_string().contains("nothing was sent or received"), "{error}");
    // Nobody is there.
    let closed = StorageOptions::new().with("endpoint", "http://127.0.0.1:1");
    let none = RetryConfig { max_retries: 0, ..RetryConfig::default() };
    let s3 = client("b", server.environment(), &closed, &Connector::default(), none).unwrap();
    let s3 = Careful::new(Arc::new(s3.clone()), Arc::new(s3)).with_limit(ms(200));
    let error = s3.put_opts(&at, "x".into(), created()).await.unwrap_err();
    assert!(error.to_string().contains("127.0.0.1:1"), "{error}");
}

/// A body that goes out slowly is no stopped one: the receiver takes more than the idle time for it.
#[tokio::test]
async fn slow_uploads() {
    use std::io::{Read, Write};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let (mut some, mut left) = (vec![0; 1 << 20], 24_i64 << 20);
        while left > 0 {
            left -= stream.read(&mut some).unwrap() as i64;
            std::thread::sleep(ms(20));
        }
        stream.write_all(b"HTTP/1.1 200 OK\r\netag: \"x\"\r\ncontent-length: 0\r\n\r\n").unwrap();
    });
    let options = StorageOptions::new().with("endpoint", endpoint).with("unsigned_payload", "true");
    let server = Server::start();
    let none = RetryConfig { max_retries: 0, ..RetryConfig::default() };
    let s3 = client("b", server.environment(), &options, &Connector::with_idle(ms(250)), none).unwrap();
    s3.put(&Path::from("x"), vec![0; 24 << 20].into()).await.unwrap();
}

/// A client is used in one runtime after the other.
#[test]
fn runtimes() {
    let server = Server::start();
    let (_, once) = clients(&server, Duration::from_secs(2));
    for round in 0..5 {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            once.put(&Path::from("x"), "x".into()).await.unwrap();
            assert_eq!(once.get(&Path::from("x")).await.unwrap().meta.size, 1, "{round}");
        });
    }
}

/// Options alone make clients, whatever the environment holds.
#[tokio::test]
async fn clients_by_options() {
    let server = Server::start();
    let options = StorageOptions::from_iter([
        ("aws_access_key_id", KEY_ID),
        ("aws_secret_access_key", SECRET),
        ("aws_endpoint_url", &server.endpoint),
    ]);
    let (store, once) = options::s3_and_once("b", &options).unwrap();
    let s3 = Careful::new(Arc::new(store), Arc::new(once));
    s3.put_opts(&Path::from("x"), "x".into(), created()).await.unwrap();
    assert_eq!(s3.head(&Path::from("x")).await.unwrap().size, 1);
    assert!(!format!("{s3:?}").contains(SECRET));
}
