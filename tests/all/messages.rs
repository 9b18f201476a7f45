//! What a user is told of usual mistakes: what was found, and what to write in its place.

use layerstore::formats::write_array;
use layerstore::{ErrorKind, Rules};
use ndarray::Array2;

use crate::support::{CHECKPOINT, INPUTS, INT4, KEYS, Place, field, refused};

/// A rule of these lines, the first of which is the third of the file.
fn rule(lines: &str) -> String {
    format!("[[rule]]\nlayers = '.*'\n{lines}\n")
}

#[test]
fn settings_of_another_type_are_told_what_to_write() {
    const HYPER: &str =
        "method = 'vq_attention'\nn_head = 2\nquery = 'q'\nkey = 'k'\nvalue = 'v'\nmechanism = 'hyper'\n";
    for (lines, says) in [
        (
            "method = 'low_rank'\nweight = 'int4'",
            &["line 4", "weight: ", "string \"int4\"", "a table, such as { type = \"int4\", group = 64 }"][..],
        ),
        ("method = 'low_rank'\nweight = 4", &["integer `4`", "a table, such as"]),
        (
            "method = 'key_value'\nbackend = 'flat'",
            &["string \"flat\"", "a table with a type, such as { type = \"flat\" }"],
        ),
        ("method = 'key_value'\nvalues = 'pq'", &["string \"pq\"", "\"int8\" or a table { type = \"pq\" }"]),
        ("method = 'key_value'\nvalues = { type = 'int8' }", &["without a table"]),
        ("method = 'key_value'\nbackend = { type = 'pq', subvectors = -1 }", &["`-1`", "a whole number of at least 0"]),
        ("method = 'key_value'\nmax_ids_capacity = 0", &["line 4: max_ids_capacity: found 0, expected at least 1"]),
        ("method = 'low_rank'\nclipping = 'percentile'", &["string \"percentile\"", "a table { percentile = 99.9 }"]),
        ("method = 'low_rank'\nclipping = 0.99", &["`0.99`", "{ percentile = 99.9 }"]),
        (
            "method = 'low_rank'\nclipping = { percentile = nan }",
            &["line 4: clipping.percentile: found NaN, expected a finite"],
        ),
        ("method = 'low_rank'\nrank = { max_bits = inf }", &["rank.max_bits: found inf, expected a finite number"]),
        ("method = 'low_rank'\nrank = 'full'", &["string \"full\"", "0 for none", "{ max_bits = 4.5 }"]),
        ("method = 'ternary'\nweight = { type = 'int4' }", &["weight: ", "`group` and `scales`"]),
        ("method = 'vq_attention'\nn_head = 'two'\nquery = 'q'\nkey = 'k'\nvalue = 'v'", &["line 4", "a whole number"]),
        (&format!("{HYPER}hyper = {{ block_size = 0 }}"), &["line 9: hyper: block_size: found 0, expected at least 1"]),
        (&format!("{HYPER}hyper = {{ lsh_num_projs = 30 }}"), &["lsh_num_projs: found 30, expected at most 24"]),
        (&format!("{HYPER}hyper = 'fast'"), &["string \"fast\"", "a table, such as { block_size = 256"]),
    ] {
        let text = rule(lines);
        refused(Rules::parse(&text, "r.toml"), ErrorKind::InvalidInput, says);
    }
}

#[test]
fn methods_that_are_offered_are_those_of_rules() {
    for method in ["magic", "module", "low-rank"] {
        let refusal = Rules::parse(&rule(&format!("method = '{method}'")), "r.toml").unwrap_err();
        let expected = format!("found '{method}', expected one of dense, key_value, low_rank, ternary, vq_attention");
        assert_eq!(refusal.to_string(), format!("r.toml, line 3: method: {expected}"));
        assert_eq!(refusal.kind(), ErrorKind::InvalidInput);
    }
}

#[test]
fn patterns_in_double_quotes_are_told_of_single_ones() {
    for (pattern, says) in [
        (r#""blocks\.\d+""#, "line 2: "),
        (r#""a\d""#, "in double quotes a backslash begins an escape"),
        (r#""a\x""#, "write patterns in single quotes, such as 'encoder\\.layer\\.\\d+'"),
        (r#""\bup\b""#, "the control character '\\u{8}', which double quotes make of a backslash"),
    ] {
        let text = format!("[[rule]]\nlayers = {pattern}\nmethod = 'dense'\n");
        refused(Rules::parse(&text, "r.toml"), ErrorKind::InvalidInput, &[says, "single quotes"]);
    }
    // What needs no hint gets none.
    for text in ["[[rule]]\nlayers = 'a\\.b' method = \"dense\"", "[[rule]]\nlayers = \"a"] {
        let message = Rules::parse(text, "r.toml").unwrap_err().to_string();
        assert!(!message.contains("single quotes"), "{message}");
    }
    assert!(
        Rules::parse("[[rule]]\nlayers = \"a\\\\.b\"\nmethod = \"dense\"", "r.toml").unwrap().find("a.b").is_some()
    );
}

#[test]
fn methods_that_need_inputs_name_the_option() {
    let place = Place::new();
    let rules = place.path("r.toml");
    let at = rules.display().to_string();
    let weight = "weight = { type = 'int4', group = 16 }\nrank = 4";
    for needs in ["rounding = 'gptq'", "scaling = 'exact'", "bias_correction = true"] {
        std::fs::write(
            &rules,
            format!("[[rule]]\nlayers = 'blocks\\.0\\.up'\nmethod = 'low_rank'\n{weight}\n{needs}\n"),
        )
        .unwrap();
        let name = needs.split(' ').next().unwrap();
        place.fails(
            1,
            &[
                "layer 'blocks.0.up'",
                name,
                "found none, expected --calibration FILE with a tensor [tokens, 48] named after",
            ],
            &["import", CHECKPOINT, "--model", "m", "--rules", &at],
        );
    }
}

#[test]
fn names_that_are_not_there_are_answered_with_the_nearest() {
    let place = Place::new();
    place.import("bert", Some(KEYS));
    place.import("other", Some(INT4));
    place.json(&["snapshot", "create", "before"]);
    place.fails(1, &["no model named 'Bert'", "models: bert, other"], &["layers", "Bert"]);
    place.fails(1, &["no model named 'othr'", "models: other, bert"], &["layers", "othr"]);
    place.fails(1, &["closest names: blocks.0.up, "], &["show", "bert", "blocks.0.up.weight"]);
    place.fails(1, &["no snapshot named 'befor'; snapshots: before"], &["--at", "befor", "models"]);
    place.fails(
        1,
        &["no model named 'brt'", "bert, other"],
        &["nearest", "bert", "blocks.0.up", "1", "--among", "brt"],
    );
    let missing = format!("{CHECKPOINT}:blocks.0.up.wieght");
    place.fails(
        1,
        &[
            "found no 'blocks.0.up.wieght', expected one that is there; closest names: blocks.0.up.weight, ",
            " and 8 more",
        ],
        &["forward", "bert", "blocks.0.up", "--input", &missing],
    );
    place.fails(
        1,
        &["found 16 and no name", "small.safetensors:TENSOR; tensors: "],
        &["forward", "bert", "blocks.0.up", "--input", CHECKPOINT],
    );
    // Inputs, too, are named after layers.
    let inputs = place.path("inputs.safetensors").display().to_string();
    write_array(&format!("{inputs}:block.0.up"), Array2::ones((3, 48)).view(), false).unwrap();
    place.fails(
        1,
        &["inputs for 'block.0.up'", "such as 'blocks.0.up'"],
        &["evaluate", "bert", "--activations", &inputs],
    );
    let import = ["import", CHECKPOINT, "--model", "c", "--calibration", &inputs];
    let said = place.run(&import).err;
    assert!(
        said.contains("tensor 'block.0.up': no layer of this checkpoint has the name; the closest is 'blocks.0.up'"),
        "{said}"
    );
}

#[test]
fn files_of_another_kind_are_named() {
    let place = Place::new();
    place.import("m", None);
    let at = |name: &str| place.path(name).display().to_string();
    let (npy, rules) = (at("x.npy"), at("rules.toml"));
    write_array(&npy, Array2::ones((2, 48)).view(), false).unwrap();
    std::fs::write(&rules, "[[rule]]\nlayers = '.*'\nmethod = 'dense'\n").unwrap();
    let inputs = "named after each layer";
    for (args, says) in [
        (
            ["import", CHECKPOINT, "--model", "n", "--calibration", &npy],
            &["x.npy: the file is an .npy array", inputs][..],
        ),
        (
            ["evaluate", "m", "--activations", &npy, "--checkpoint", CHECKPOINT],
            &["an .npy array; expected safetensors", inputs],
        ),
        (
            ["evaluate", "m", "--activations", INPUTS, "--checkpoint", &npy],
            &["the file is an .npy array; expected safetensors"],
        ),
        (
            ["import", &rules, "--model", "n", "--rules", &rules],
            &["rules.toml: the file is text; expected safetensors"],
        ),
        (
            ["import", CHECKPOINT, "--model", "n", "--rules", &npy],
            &["the file is an .npy array; expected rules in TOML"],
        ),
        (
            ["import", CHECKPOINT, "--model", "n", "--rules", CHECKPOINT],
            &["a safetensors file; expected rules in TOML"],
        ),
        (
            ["import", CHECKPOINT, "--model", "n", "--rules", "tests"],
            &["a directory; expected a file of rules in TOML"],
        ),
    ] {
        place.fails(1, says, &args);
    }
    for (from, name, says) in [
        (CHECKPOINT, "weights.npy", "the file is a safetensors file; expected an .npy array"),
        (&npy, "x.safetensors", "the file is an .npy array; expected safetensors"),
    ] {
        std::fs::copy(from, place.path(name)).unwrap();
        place.fails(1, &[name, says], &["forward", "m", "blocks.0.up", "--input", &at(name)]);
    }
    std::fs::copy(&npy, place.path("model.keras")).unwrap();
    place.fails(1, &["an .npy array; expected a ZIP archive"], &["import", &at("model.keras"), "--model", "n"]);
    std::fs::write(place.path("block.toml"), "n_head = 2\nn_code = 0\nmethod = 'vq_attention'\n").unwrap();
    let train = |settings: &str, says: &[&str]| {
        place.fails(1, says, &["codebooks", "train", "m", "a", "--queries", &npy, "--settings", settings]);
    };
    train(&at("block.toml"), &["block.toml, line 3: method: unknown field `method`"]);
    std::fs::write(place.path("block.toml"), "n_head = 2\nn_code = 0\nscale = nan\n").unwrap();
    train(&at("block.toml"), &["block.toml, line 3: scale: found NaN, expected a finite number"]);
    std::fs::write(place.path("block.toml"), "n_head = 2\nn_code = 0\n").unwrap();
    train(&at("block.toml"), &["block.toml, line 2: n_code: found 0, expected at least 1"]);
    let settings = ["codebooks", "train", "m", "a", "--queries", &npy, "--settings", &npy];
    place.fails(1, &["an .npy array; expected settings of an attention block in TOML"], &settings);
}

#[test]
fn counts_have_the_number_of_their_noun() {
    let place = Place::new();
    let checkpoint = place.path("one.safetensors").display().to_string();
    write_array(&format!("{checkpoint}:a.weight"), Array2::eye(4).view(), false).unwrap();
    let import = ["import", &checkpoint, "--model", "m"];
    let dry = place.run(&[&import[..], &["--dry-run"]].concat()).out;
    assert!(dry.contains("\n1 layer, "), "{dry}");
    let done = place.run(&import);
    assert!(done.out.contains("version 2: 1 layer, ") && done.err.contains("1 of 1 layer, now a"), "{}", done.err);
    assert_eq!(place.run(&["verify"]).out, "1 artifact is as it was written\n");
    let gc = place.run(&["gc", "--older-than", "0s"]).out;
    assert!(gc.starts_with("0 artifacts and 0 stray rows"), "{gc}");
    let exported = place.run(&["export", "m", "--output", &place.path("two.safetensors").display().to_string()]).out;
    assert!(exported.starts_with("1 layer, "), "{exported}");
    write_array(&place.path("2.safetensors:a.weight").display().to_string(), Array2::ones((4, 4)).view(), false)
        .unwrap();
    place.json(&["import", &place.path("2.safetensors").display().to_string(), "--model", "m"]);
    let gc = place.run(&["gc", "--older-than", "0s"]).out;
    assert!(gc.starts_with("1 artifact and 0 stray rows"), "{gc}");
    // What is not listed is counted as well.
    std::fs::remove_dir_all(place.path("layers/artifacts.lance")).unwrap();
    let verified = place.run(&["verify"]);
    assert_eq!(verified.code, 1);
    assert!(verified.out.contains("corrupt: 2 of 2 artifacts"), "{}", verified.out);
    assert_eq!(place.run(&["--format", "json", "verify"]).out.matches("\"artifacts\":2").count(), 1);
}

#[test]
fn commands_that_read_no_version_refuse_one() {
    let place = Place::new();
    place.import("m", Some(KEYS));
    let elsewhere = place.path("copy").display().to_string();
    for args in [
        &["import", CHECKPOINT, "--model", "n"][..],
        &["codebooks", "train", "m", "a", "--queries", "x.npy"],
        &["index"],
        &["remove", "m"],
        &["rename", "m", "n"],
        &["snapshot", "list"],
        &["snapshot", "delete", "a"],
        &["restore", "1"],
        &["log"],
        &["diff", "1", "2"],
        &["verify"],
        &["repair"],
        &["gc"],
    ] {
        let says =
            [args[0], "expected a command that reads a version (models, layers, show, compare, forward, generate, "];
        place.fails(2, &says, &[&["--at", "1"], args].concat());
    }
    // Those that the message names take one.
    let output = place.path("m.safetensors").display().to_string();
    let x = place.path("x.npy").display().to_string();
    write_array(&x, Array2::ones((2, 48)).view(), false).unwrap();
    for args in [
        &["models"][..],
        &["layers", "m"],
        &["show", "m", "blocks.0.up"],
        &["forward", "m", "blocks.0.up", "--input", &x],
        &["search", "m", "blocks.0.up", "--input", &x],
        &["nearest", "m", "blocks.0.up", "1"],
        &["shared", "m", "m"],
        &["copy", "m", "blocks.0.up", &elsewhere],
        &["evaluate", "m", "--activations", INPUTS, "--checkpoint", CHECKPOINT],
        &["export", "m", "--output", &output],
        &["compare", "m", "m@latest"],
        &["stats"],
        &["snapshot", "create", "a"],
    ] {
        place.json(&[&["--at", "2"], args].concat());
    }
    place.fails(1, &["'blocks.0.up', a key_value layer"], &["--at", "2", "attend", "m", "blocks.0.up", "--q", &x]);
}

#[test]
fn addresses_of_no_store_say_what_is_wanted() {
    let place = Place::new();
    // By an option, or by the environment.
    let at = |option: Option<&str>, variable: Option<&str>, args: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_layerstore"));
        command.current_dir(place.folder.path()).args(option.iter().flat_map(|store| ["--store", store])).args(args);
        match variable {
            Some(variable) => command.env("LAYERSTORE_URI", variable),
            None => command.env_remove("LAYERSTORE_URI"),
        };
        let done = command.output().unwrap();
        (done.status.code(), String::from_utf8(done.stderr).unwrap())
    };
    for (scheme, feature, built) in [
        ("gs", "gcs", cfg!(feature = "gcs")),
        ("az", "azure", cfg!(feature = "azure")),
        ("abfss", "azure", cfg!(feature = "azure")),
    ] {
        if !built {
            let says = format!("without support for {scheme}://, expected one built with `--features {feature}`");
            let (code, said) = at(Some(&format!("{scheme}://bucket/models")), None, &["models"]);
            assert!(code == Some(1) && said.contains(&says), "{said}");
        }
    }
    for (option, variable) in [(Some(""), None), (Some(""), Some("layers")), (None, Some(""))] {
        let (code, said) = at(option, variable, &["models"]);
        assert_eq!(code, Some(2), "{said}");
        assert!(
            said.contains("the address is empty") && said.contains("LAYERSTORE_URI not set, for ./layers"),
            "{said}"
        );
    }
    let (code, said) = at(None, None, &["models"]);
    assert!(code == Some(1) && said.contains("/layers is not a layer store"), "{said}");
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("nowhere", place.path("link")).unwrap();
        let (code, said) = at(Some("link"), None, &["models"]);
        let says = "/nowhere is not a layer store: the directory does not exist (the symbolic link link leads there)";
        assert!(code == Some(1) && said.contains(says), "{said}");
        // An import makes it where the link leads.
        let checkpoint = std::path::absolute(CHECKPOINT).unwrap().display().to_string();
        assert_eq!(at(Some("link"), None, &["import", &checkpoint, "--model", "m"]).0, Some(0));
        assert!(place.path("nowhere/layers.lance").is_dir());
    }
}

/// A file that a command makes can be read by whom the process lets read its files.
#[cfg(unix)]
#[test]
fn new_files_have_the_mode_that_the_process_gives() {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::new();
    place.import("m", None);
    let x = place.path("x.npy").display().to_string();
    write_array(&x, Array2::ones((2, 48)).view(), false).unwrap();
    for (umask, expected) in [("022", 0o644), ("027", 0o640), ("077", 0o600)] {
        for (name, args) in [
            ("m.safetensors", &["export", "m", "--output"][..]),
            ("y.npy", &["forward", "m", "blocks.0.up", "--input", &x, "--output"]),
            ("y.safetensors", &["forward", "m", "blocks.0.up", "--input", &x, "--output"]),
        ] {
            let path = place.path(&format!("{umask}-{name}"));
            let script = format!("umask {umask}; exec \"$0\" \"$@\"");
            let mut shell = std::process::Command::new("sh");
            shell.args(["-c", &script, env!("CARGO_BIN_EXE_layerstore"), "--quiet", "--store", &place.store()]);
            let done = shell.args(args).arg(&path).output().unwrap();
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
            assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, expected, "{}", path.display());
        }
    }
}

/// Settings of attention blocks of queries and keys of their own.
fn attention(place: &Place, name: &str, settings: &str, seed: f32) -> String {
    let path = place.path(&format!("{name}.toml")).display().to_string();
    std::fs::write(&path, settings).unwrap();
    let queries = place.path(&format!("{name}.npy")).display().to_string();
    let x = Array2::from_shape_fn((70, 8), |(i, j)| ((i * 8 + j) as f32 * seed).sin());
    write_array(&queries, x.view(), false).unwrap();
    place.json(&["codebooks", "train", "m", name, "--queries", &queries, "--settings", &path, "--epochs", "1"]);
    queries
}

#[test]
fn a_state_is_of_one_block() {
    let place = Place::new();
    let causal = "n_head = 2\nn_code = 6\nblock_len = 4\n";
    let x = attention(&place, "first", causal, 0.37);
    attention(&place, "second", causal, 0.73);
    attention(&place, "both", "n_head = 2\nn_code = 6\ncausal = false\n", 0.37);
    let state = place.path("state.safetensors").display().to_string();
    let attend = |block: &'static str| ["attend", "m", block, "--q", &x, "--state", &state].map(str::to_owned);
    let run = |block| place.json(&attend(block).each_ref().map(String::as_str));
    let refuse = |block, says: &[&str]| place.fails(1, says, &attend(block).each_ref().map(String::as_str));
    refuse(
        "both",
        &["layer 'both'", "found a block that is not causal, expected a causal block of mechanism \"vq_qk\""],
    );
    assert!(!place.path("state.safetensors").exists());
    run("first");
    run("first");
    refuse("second", &["state.safetensors: the state in it is of another block"]);
    refuse("both", &["a block that is not causal"]);
    // Nor does it fit the block once its codebooks have changed.
    let before = std::fs::read(&state).unwrap();
    place.json(&["snapshot", "create", "before"]);
    place.json(&["codebooks", "train", "m", "first", "--queries", &x, "--epochs", "1"]);
    refuse("first", &["or of this one before its codebooks or its key and value projections changed"]);
    assert_eq!(std::fs::read(&state).unwrap(), before);
    place.json(&[&["--at", "before"], &attend("first").each_ref().map(String::as_str)[..]].concat());
    // As files were before they named a block.
    let file = layerstore::formats::open(&state).unwrap();
    let tensors: Vec<_> = file.tensors().values().map(|t| (t.clone(), file.bytes(t).unwrap().into_owned())).collect();
    let views = tensors.iter().map(|(t, bytes)| {
        (t.name.as_str(), safetensors::tensor::TensorView::new(t.dtype, t.shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &place.path("state.safetensors")).unwrap();
    refuse("first", &["the state in it does not say which block it is of"]);
    std::fs::remove_file(&state).unwrap();
    write_array(&state, Array2::ones((2, 2)).view(), false).unwrap();
    refuse("first", &["there is no state in it"]);
}

#[test]
fn training_is_called_training_and_counted_in_epochs() {
    let place = Place::new();
    let x = attention(&place, "block", "n_head = 2\nn_code = 6\nblock_len = 4\n", 0.37);
    let train = ["codebooks", "train", "m", "block", "--queries", &x, "--epochs", "3", "--batch", "10"];
    let report = place.json(&train);
    let errors: Vec<f64> = report["attention_error"].as_array().unwrap().iter().map(|e| e.as_f64().unwrap()).collect();
    assert!(errors.len() == 2 && errors.iter().all(|e| *e > 0.0 && *e < 1.0) && errors[0] != errors[1], "{report}");
    let ran = place.run(&train);
    assert_eq!(ran.code, 0, "{}", ran.err);
    let lines: Vec<&str> = ran.err.lines().collect();
    assert_eq!(lines, ["1 of 3 epochs", "2 of 3 epochs", "3 of 3 epochs"]);
    assert!(ran.out.contains("version 4: 21 steps; attention error 0."), "{}", ran.out);
    // Begun with what the training before ended with.
    let error = |report: &serde_json::Value, place: usize| report["attention_error"][place].as_f64().unwrap();
    let last = place.json(&train);
    let next = place.json(&train);
    assert_eq!(error(&next, 0), error(&last, 1));
    let log = place.json(&["log"]);
    assert_eq!(
        (field(&log[0], "operation"), field(&log[0], "message")),
        (&"train m".into(), &"codebooks of 'block', 3 epochs".into())
    );
    // Keys of another number than queries: nothing to attend with.
    let keys = place.path("keys.npy").display().to_string();
    write_array(&keys, Array2::from_shape_fn((30, 8), |(i, j)| ((i + 3 * j) as f32).cos()).view(), false).unwrap();
    let apart = place.json(&[&train[..], &["--keys", &keys]].concat());
    assert!(apart["attention_error"].is_null() && apart.get("attention_error").is_some(), "{apart}");
}
