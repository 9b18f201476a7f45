//! Everything that needs a store on disk, in one binary: each one links LanceDB.

mod attention;
mod cli;
mod faults;
mod golden;
mod keys;
mod matmul_free;
mod processes;
mod store;
mod support;
