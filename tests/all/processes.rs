//! Several processes on one store, and processes that die.

use std::time::Duration;

use crate::support::{CHECKPOINT, INPUTS, INT4, KEYS, Place};

/// An import that is killed at any moment leaves the store as it was, and can be run again.
#[test]
fn killed_imports_leave_nothing_half_done() {
    let place = Place::new();
    place.import("before", None);
    let mut killed = 0;
    for step in 0..12u64 {
        let rules = if step % 2 == 0 { INT4 } else { KEYS };
        let mut child =
            place.spawn(&["--quiet", "import", CHECKPOINT, "--model", "m", "--rules", rules, "--calibration", INPUTS]);
        std::thread::sleep(Duration::from_millis(15 + 45 * step));
        let running = child.try_wait().unwrap().is_none();
        child.kill().unwrap();
        child.wait().unwrap();
        killed += usize::from(running);
        let models = place.json(&["models"]);
        for model in models.as_array().unwrap() {
            assert_eq!(model["layers"], 10, "{models}");
            let methods = model["methods"].as_object().unwrap();
            assert!(methods.len() == if model["model"] == "m" { 2 } else { 1 }, "{models}");
        }
        assert_eq!(place.json(&["verify"])["corrupt"], serde_json::json!([]));
    }
    assert!(killed > 0);
    place.json(&["gc", "--older-than", "0s", "--apply"]);
    assert_eq!(place.import("m", Some(INT4))["layers"].as_array().unwrap().len(), 10);
    assert_eq!(place.json(&["verify"])["corrupt"], serde_json::json!([]));
}

/// Imports of one model at once: each commit replaces the model as a whole. Imports of other models all land.
#[test]
fn writers_do_not_mix() {
    let place = Place::new();
    let mut children = vec![];
    for round in 0..2 {
        for rules in [INT4, KEYS] {
            children.push(place.spawn(&[
                "--quiet",
                "import",
                CHECKPOINT,
                "--model",
                "same",
                "--rules",
                rules,
                "--calibration",
                INPUTS,
            ]));
        }
        let own = format!("own-{round}");
        children.push(place.spawn(&["--quiet", "import", CHECKPOINT, "--model", &own]));
    }
    // Readers beside them, at any state the store is in.
    for _ in 0..5 {
        let _ = place.run(&["models"]);
    }
    for child in children {
        let done = child.wait_with_output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }
    let models = place.json(&["models"]);
    assert_eq!(models.as_array().unwrap().len(), 3);
    for model in models.as_array().unwrap() {
        assert_eq!(model["layers"], 10, "{models}");
    }
    let methods = models[2]["methods"].as_object().unwrap();
    assert_eq!(methods.len(), 2, "one import's methods and dense: {models}");
    // What two of them wrote twice is collected, and all is still there.
    place.json(&["gc", "--older-than", "0s", "--apply"]);
    assert_eq!(place.json(&["verify"])["corrupt"], serde_json::json!([]));
    assert_eq!(place.json(&["gc", "--older-than", "0s"])["stray_rows"], 0);
}
