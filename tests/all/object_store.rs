//! Stores on S3: a server in this process, which can be told to answer wrongly, late or not at all.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use layerstore::formats::write_array;
use layerstore::layer::Layer;
use layerstore::{DiskCacheOptions, Error, ErrorKind, Reader, Store, StoreOptions};
use ndarray::Array2;
use serde_json::Value;

use crate::numbered::{layer, options, put, sound, troubles};
use crate::s3::{Act, Fault, KEY_ID, Kind, Nth, On, SECRET, Server, round_trips};
use crate::support::{CHECKPOINT, INPUTS, INT4, Place};

/// Every verb of the command line that is not about local files, beside a store on disk.
#[test]
fn a_model_lies_on_s3_and_runs_from_there() {
    let server = Server::start();
    server.page(3);
    let (here, there) = (Place::on_disk(), Place::on_s3(&server));
    for place in [&here, &there] {
        place.import("m", Some(INT4));
        place.import("dense", None);
        place.json(&["snapshot", "create", "both"]);
        assert_eq!(place.import("m", Some(INT4))["version"], 3, "nothing has changed");
        place.json(&["rename", "dense", "plain"]);
        place.json(&["remove", "plain"]);
        place.json(&["restore", "both"]);
    }
    let plain = |mut value: Value| {
        // Of another place and time.
        fn strip(value: &mut Value) {
            match value {
                Value::Object(map) => {
                    for key in ["created_at", "time", "places", "locations"] {
                        map.remove(key);
                    }
                    map.values_mut().for_each(strip);
                }
                Value::Array(all) => all.iter_mut().for_each(strip),
                _ => {}
            }
        }
        strip(&mut value);
        value
    };
    for args in [
        &["models"][..],
        &["layers", "m"],
        &["show", "m"],
        &["show", "m", "blocks.0.up"],
        &["log"],
        &["snapshot", "list"],
        &["diff", "both", "5"],
        &["compare", "m", "dense"],
        &["verify"],
        &["verify", "--deep"],
    ] {
        assert_eq!(plain(here.json(args)), plain(there.json(args)), "{args:?}");
    }
    let input = here.path("x.npy").display().to_string();
    write_array(&input, Array2::ones((2, 48)).view(), false).unwrap();
    for at in ["both", "latest"] {
        let forward = ["--at", at, "forward", "m", "blocks.0.up", "--input", &input];
        assert_eq!(here.json(&forward), there.json(&forward));
    }
    // From there to here, and back under another name.
    let local = here.path("copied").display().to_string();
    there.json(&["copy", "m", &local]);
    let other = format!("{}-other", there.store());
    there.json(&["copy", "m", &other]);
    // gc takes and keeps the same.
    let counted = |report: Value| {
        let mut report = plain(report);
        // Of files that no version has, those on S3 stay for a week.
        for key in ["removed_bytes", "reclaimable_bytes"] {
            report.as_object_mut().map(|report| report.remove(key));
        }
        report
    };
    let bytes: usize = server.objects().values().map(|bytes| bytes.len()).sum();
    for args in [&["gc", "--older-than", "0s"][..], &["gc", "--older-than", "0s", "--apply"], &["verify"], &["models"]]
    {
        assert_eq!(counted(here.json(args)), counted(there.json(args)), "{args:?}");
    }
    assert!(server.objects().values().map(|bytes| bytes.len()).sum::<usize>() < bytes);
    there.fails(1, &["version 2"], &["restore", "2"]);
    there.json(&["repair"]);
    // What was said to reach it is nowhere.
    let heads = String::from_utf8_lossy(&server.heads()).into_owned();
    assert!(heads.contains(KEY_ID) && !heads.contains(SECRET));
    for (key, bytes) in server.objects() {
        let text = String::from_utf8_lossy(&bytes);
        assert!(!text.contains(SECRET) && !text.contains(KEY_ID), "{key}");
    }
}

/// Options stand in the place of the environment, and are shown nowhere.
#[test]
fn storage_options_reach_the_server() {
    let server = Server::start();
    let place = Place::on_s3(&server);
    place.import("m", None);
    let plain = |args: &[&str]| {
        let mut command = place.command(args);
        for (name, _) in server.environment() {
            command.env_remove(name);
        }
        let done = command.output().unwrap();
        (done.status.code(), String::from_utf8(done.stdout).unwrap() + &String::from_utf8(done.stderr).unwrap())
    };
    let (code, said) = plain(&["models"]);
    assert!(code == Some(1) && said.contains("AWS_ACCESS_KEY_ID"), "{said}");
    let endpoint = format!("endpoint={}", server.endpoint);
    let secret = format!("secret_access_key={SECRET}");
    let key = format!("access_key_id={KEY_ID}");
    let given =
        ["--storage-option", &endpoint, "--storage-option", &secret, "--storage-option", &key, "models"].to_vec();
    let (code, said) = plain(&given);
    assert!(code == Some(0) && said.contains('m'), "{said}");
    let wrong = given.iter().map(|arg| if *arg == key { "access_key_id=other" } else { arg }).collect::<Vec<_>>();
    let (code, said) = plain(&wrong);
    assert!(code == Some(1) && !said.contains(SECRET), "{said}");
    let unknown = [&["--storage-option", "secret=hidden-value"], &given[..]].concat();
    let (code, said) = plain(&unknown);
    assert!(code == Some(1) && said.contains("there is no storage option \"secret\""), "{said}");
    assert!(!said.contains("hidden-value") && !said.contains(SECRET), "{said}");
    let (code, said) = plain(&["--storage-option", "hidden-value", "models"]);
    assert!(code == Some(2) && said.contains("KEY=VALUE"), "{said}");
    let shown = format!("{:?}", options(&server));
    assert!(!shown.contains(SECRET) && !shown.contains(KEY_ID) && shown.contains("secret_access_key"), "{shown}");
}

/// Processes that all make the store make one store.
#[test]
fn eight_processes_make_one_store() {
    let server = Server::start();
    server.faults(troubles(1, Kind::Manifest));
    let place = Place::on_s3(&server);
    let children: Vec<_> = (0..8)
        .map(|i| {
            let model = format!("m{i}");
            let args = ["--format", "json", "--quiet", "import", CHECKPOINT, "--model", &model, "--rules", INT4];
            let args = [&args[..], &["--calibration", INPUTS]].concat();
            place.command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for child in children {
        let done = child.wait_with_output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }
    server.faults(vec![]);
    let log = place.json(&["log"]);
    let operations: Vec<&str> = log.as_array().unwrap().iter().map(|v| v["operation"].as_str().unwrap()).collect();
    assert_eq!(operations.iter().filter(|operation| operation.starts_with("import m")).count(), 8, "{operations:?}");
    assert_eq!(operations.iter().filter(|operation| **operation == "create").count(), 1, "{operations:?}");
    assert_eq!(place.json(&["models"]).as_array().unwrap().len(), 8);
    for i in 0..8 {
        let layers = place.json(&["layers", &format!("m{i}")]);
        assert_eq!(layers, with_model(place.json(&["layers", "m0"]), &format!("m{i}"), &layers));
    }
    assert_eq!(place.json(&["verify"])["corrupt"], Value::Array(vec![]));
}

/// Rows of one model under another's name, with the times that the other's have.
fn with_model(rows: Value, model: &str, like: &Value) -> Value {
    let mut rows = rows;
    for (row, like) in rows.as_array_mut().unwrap().iter_mut().zip(like.as_array().unwrap()) {
        row["model"] = model.into();
        for key in ["created_at", "places", "locations"] {
            if let Some(value) = like.get(key) {
                row[key] = value.clone();
            }
        }
    }
    rows
}

/// Whatever is acknowledged is there, once, also where writers change the same model at once and answers are lost.
#[test]
fn writers_at_once_lose_nothing() {
    const WRITERS: u32 = 8;
    const EACH: u32 = 20;
    let server = Server::start();
    let uri = "s3://test/writers".to_owned();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    server.faults(troubles(100, Kind::Any));
    let acknowledged: Vec<(String, String, u32, u64)> = runtime.block_on(async {
        let tasks: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let (uri, options) = (uri.clone(), options(&server));
                tokio::spawn(async move {
                    let store = Store::create_with(&uri, options).await.unwrap();
                    let mut done = vec![];
                    for i in 0..EACH {
                        // Some of one model, some of one's own; some layers are replaced again and again.
                        let model = if i % 2 == 0 { "shared".to_owned() } else { format!("own-{writer}") };
                        let name = format!("layer.{writer}.{}", i % 6);
                        let number = writer * 1000 + i;
                        let version = put(&store, &model, &name, number).await.unwrap();
                        done.push((model, name, number, version));
                    }
                    done
                })
            })
            .collect();
        let mut all = vec![];
        for task in tasks {
            all.extend(task.await.unwrap());
        }
        all
    });
    server.faults(vec![]);
    assert_eq!(acknowledged.len() as u32, WRITERS * EACH);
    runtime.block_on(async {
        let store = Store::open_with(&uri, options(&server)).await.unwrap();
        let versions: BTreeSet<u64> = acknowledged.iter().map(|(.., version)| *version).collect();
        assert_eq!(versions.len(), acknowledged.len(), "each change is a version of its own");
        let mut expected = BTreeMap::new();
        for (model, name, number, version) in &acknowledged {
            let at = store.at(&version.to_string()).await.unwrap();
            assert_eq!(at.layer(model, name).await.unwrap().record().artifact, layer(*number).to_parts().id());
            let last = expected.entry((model.clone(), name.clone())).or_insert((*version, *number));
            *last = (*last).max((*version, *number));
        }
        let rows = store.latest().await.unwrap().records().await.unwrap();
        let rows: Vec<_> = rows.into_iter().map(|r| ((r.model, r.layer), r.artifact)).collect();
        let expected: Vec<_> =
            expected.into_iter().map(|(key, (_, number))| (key, layer(number).to_parts().id())).collect();
        assert_eq!(rows, expected);
        let log = store.log().await.unwrap();
        assert_eq!(log.iter().filter(|v| v.operation.starts_with("import")).count(), acknowledged.len());
        sound(&store).await;
    });
}

/// A restore beside imports is a version between them: what was acknowledged is in the log, and each restore shows what it restored.
#[test]
fn restores_and_imports_at_once() {
    let server = Server::start();
    let uri = "s3://test/restores".to_owned();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let store = Store::create_with(&uri, options(&server)).await.unwrap();
        put(&store, "m", "first", 1).await.unwrap();
        store.create_snapshot("first").await.unwrap();
        server.faults(troubles(7, Kind::Manifest));
        let imports = {
            let store = store.clone();
            tokio::spawn(async move {
                let mut done = vec![];
                for i in 0..25 {
                    done.push((i, put(&store, "m", &format!("layer.{i}"), 10 + i).await.unwrap()));
                }
                done
            })
        };
        let other = Store::open_with(&uri, options(&server)).await.unwrap();
        let mut restored = vec![];
        for _ in 0..25 {
            restored.push(other.restore("first").await.unwrap().version);
        }
        let imported = imports.await.unwrap();
        server.faults(vec![]);
        for (i, version) in imported {
            let at = store.at(&version.to_string()).await.unwrap();
            let found = at.layer("m", &format!("layer.{i}")).await.unwrap();
            assert_eq!(found.record().artifact, layer(10 + i).to_parts().id());
        }
        for version in restored {
            let rows = store.at(&version.to_string()).await.unwrap().records().await.unwrap();
            assert_eq!(rows.iter().map(|r| r.layer.as_str()).collect::<Vec<_>>(), ["first"]);
        }
        let numbers: Vec<u64> = store.log().await.unwrap().iter().map(|version| version.version).collect();
        assert!(numbers.windows(2).all(|pair| pair[0] == pair[1] + 1), "no version is missing");
        sound(&store).await;
    });
}

/// Writers that begin at once all make the tables that they need: none empties one that another has filled.
#[test]
fn tables_are_made_once() {
    let server = Server::start();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    for round in 0..10 {
        server.faults(troubles(1000 * round, Kind::Manifest));
        let uri = format!("s3://test/tables-{round}");
        runtime.block_on(async {
            let tasks: Vec<_> = (0..3)
                .map(|writer| {
                    let (uri, options) = (uri.clone(), options(&server));
                    tokio::spawn(async move {
                        let store = Store::create_with(&uri, options).await.unwrap();
                        put(&store, &format!("m{writer}"), "layer", writer).await.unwrap();
                    })
                })
                .collect();
            for task in tasks {
                task.await.unwrap();
            }
            server.faults(vec![]);
            let store = Store::open_with(&uri, options(&server)).await.unwrap();
            for writer in 0..3 {
                let handle = store.latest().await.unwrap().layer(&format!("m{writer}"), "layer").await.unwrap();
                assert_eq!(handle.load().await.unwrap().to_parts().id(), layer(writer).to_parts().id());
            }
            sound(&store).await;
        });
    }
}

/// What is not given is not damaged: nothing is written in its place.
#[test]
fn a_refusal_is_no_damage() {
    let server = Server::start();
    let uri = "s3://test/refused".to_owned();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let store = Store::create_with(&uri, options(&server)).await.unwrap();
        put(&store, "m", "layer", 1).await.unwrap();
        let before = server.objects();
        let refused = Fault { on: On::Get(Kind::Data), nth: Nth::Every(1), act: Act::Answer(403) };
        server.faults(vec![refused]);
        let fresh = Store::open_with(&uri, options(&server)).await.unwrap();
        let storage = |e: &Error| assert_eq!(e.kind(), ErrorKind::Storage, "{e}");
        storage(&fresh.latest().await.unwrap().layer("m", "layer").await.map(drop).unwrap_err());
        storage(&put(&fresh, "m", "layer", 1).await.unwrap_err());
        server.faults(vec![]);
        assert_eq!(server.objects().keys().collect::<Vec<_>>(), before.keys().collect::<Vec<_>>());
        sound(&store).await;
        // Bodies that end early or come slowly are read to their end.
        server.faults(vec![
            Fault { on: On::Get(Kind::Any), nth: Nth::Every(3), act: Act::CutBody(100) },
            Fault { on: On::Get(Kind::Any), nth: Nth::Every(5), act: Act::Trickle(1 << 16) },
            Fault { on: On::Get(Kind::Any), nth: Nth::Every(7), act: Act::Answer(503) },
        ]);
        let fresh = Store::open_with(&uri, options(&server)).await.unwrap();
        let handle = fresh.latest().await.unwrap().layer("m", "layer").await.unwrap();
        assert_eq!(handle.load().await.unwrap().to_parts().id(), layer(1).to_parts().id());
    });
}

/// Opening a store and loading its first layer waits for few answers, one after another; a second load of another process takes the bytes
/// of the layer from the disk, unless they were damaged there.
#[test]
fn a_first_layer_takes_few_round_trips() {
    let server = Server::start();
    let uri = "s3://test/round-trips";
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let data = |server: &Server| {
        server.log().iter().filter(|seen| seen.key.contains("/data/") && !seen.key.contains("/layers.lance/")).count()
    };
    let opened = |reader| {
        let disk_cache = Some(DiskCacheOptions { directory: folder.path().join("copies"), bytes: 1 << 20 });
        StoreOptions { disk_cache, reader: Some(reader), ..options(&server) }
    };
    runtime.block_on(async {
        let store = Store::create_with(uri, options(&server)).await.unwrap();
        for number in 0..12 {
            put(&store, &format!("m{}", number % 3), &format!("layer.{number}"), number).await.unwrap();
        }
        for round in 0..3 {
            // Long beside what else a busy machine does between two requests.
            server.latency(Duration::from_millis(100));
            server.clear_log();
            let store = Store::open_with(uri, opened(Reader::Direct)).await.unwrap();
            let handle = store.seen().layer("m1", "layer.7").await.unwrap();
            let before = server.log().len();
            let loaded = handle.load().await.unwrap();
            server.latency(Duration::ZERO);
            assert_eq!(loaded.to_parts().id(), layer(7).to_parts().id());
            let seen = server.log();
            let requests: Vec<_> =
                seen.iter().map(|seen| format!("{} {} {:?}", seen.method, seen.key, seen.range)).collect();
            let (all, load) = (server.round_trips(), round_trips(&seen[before..]));
            assert!(all <= 6 && load <= 1, "{all} {load}: {requests:#?}");
            // The second round finds what the first has kept.
            assert_eq!(data(&server) == 0, round == 1, "{requests:#?}");
            if round == 1 {
                for copy in copies(&folder.path().join("copies")) {
                    let mut bytes = std::fs::read(&copy).unwrap();
                    bytes[0] ^= 1;
                    std::fs::write(&copy, bytes).unwrap();
                }
            }
        }
        // What is verified is read from the store itself.
        server.clear_log();
        sound(&Store::open_with(uri, opened(Reader::Direct)).await.unwrap()).await;
        assert!(data(&server) > 0);
        let lance = Store::open_with(uri, opened(Reader::Lance)).await.unwrap();
        let handle = lance.seen().layer("m1", "layer.7").await.unwrap();
        assert_eq!(handle.load().await.unwrap().to_parts().id(), layer(7).to_parts().id());
    });
}

/// The files in the folders of a directory.
fn copies(directory: &Path) -> Vec<PathBuf> {
    let folders = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    folders.flat_map(|folder| std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path())).collect()
}

/// Damage of objects is found and mended as that of files is: rows from the checkpoint, a lost list by the next import.
#[test]
fn damaged_objects_are_mended() {
    let server = Server::start();
    let place = Place::on_s3(&server);
    place.import("m", Some(INT4));
    let objects = server.objects();
    let (key, bytes) = objects.iter().find(|(key, _)| key.contains("/weight_blocks.lance/data/")).unwrap();
    let mut bytes = bytes.to_vec();
    bytes[100] ^= 1;
    server.set(key, Some(bytes));
    let found = place.run(&["--format", "json", "verify"]);
    assert!(found.code == 1 && found.out.contains("\"corrupt\""), "{} {}", found.out, found.err);
    let mended = place.json(&["repair", "--from", CHECKPOINT, "--calibration", INPUTS]);
    assert!(!mended["mended"].as_array().unwrap().is_empty(), "{mended}");
    assert_eq!(place.json(&["verify", "--deep"])["corrupt"], Value::Array(vec![]));
    let newest = server.objects().into_keys().find(|key| key.contains("/artifacts.lance/_versions/")).unwrap();
    server.set(&newest, None);
    place.import("again", None);
    assert_eq!(place.json(&["verify", "--deep"])["corrupt"], Value::Array(vec![]));
    assert_eq!(place.json(&["models"]).as_array().unwrap().len(), 2);
    // A version of the catalogue that cannot be read any more: the one before it is there.
    for part in [2, usize::MAX] {
        let (newest, bytes) =
            server.objects().into_iter().find(|(key, _)| key.contains("/layers.lance/_versions/")).unwrap();
        server.set(&newest, Some(bytes[..bytes.len() / part].to_vec()));
        assert_eq!(place.run(&["models"]).code, 1);
        place.json(&["repair"]);
        assert_eq!(place.json(&["models"]).as_array().unwrap().len(), 1);
        place.import("again", None);
        assert_eq!(place.json(&["verify"])["corrupt"], Value::Array(vec![]));
    }
}
