//! The `layerstore` command; see `layerstore --help`.

fn main() -> std::process::ExitCode {
    layerstore::cli::main().into()
}
