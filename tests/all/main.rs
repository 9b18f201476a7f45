//! Everything that needs a store on disk, in one binary: each one links LanceDB.

mod attention;
mod calibration;
mod catalogue;
mod cli;
mod damage;
mod encoders;
mod export;
mod faults;
mod files;
mod formats_out;
mod golden;
mod keys;
mod language;
mod leases;
mod matmul_free;
mod messages;
mod method;
mod mutations;
mod numbered;
mod object_store;
mod packed;
mod processes;
// The tests of the client use the rest.
#[allow(dead_code)]
mod s3;
mod store;
mod support;
mod text_calibration;
