//! A store on S3, whose server takes 20 ms for each request: opening it and loading the first layer, and loading a large layer, beside the
//! same bytes asked for in ranges and kept as they come.

use std::time::{Duration, Instant};

use futures::future::try_join_all;
use layerstore::layer::{DType, DenseLayer, Layer};
use layerstore::{StorageOptions, Store, StoreOptions};

use super::server::{KEY_ID, SECRET, Seen, Server, round_trips};
use super::{Result, median, name, store_as};

const LATENCY: Duration = Duration::from_millis(20);
const SIDE: usize = 4096;
const ROUNDS: usize = 9;

pub async fn s3() -> Result<()> {
    let server = Server::start();
    let storage_options = StorageOptions::new()
        .with("endpoint", &server.endpoint)
        .with("access_key_id", KEY_ID)
        .with("secret_access_key", SECRET)
        .with("region", "us-east-1");
    let options = || StoreOptions { storage_options: storage_options.clone(), ..StoreOptions::default() };
    let store = Store::create_with("s3://test/layers", options()).await?;
    let small = DenseLayer::new(DType::F32, vec![8, 8], vec![1; 256].into(), None)?.shared();
    let bytes: Vec<u8> = (0..4 * SIDE * SIDE).map(|i| (i * 31 / 7) as u8).collect();
    let large = DenseLayer::new(DType::F32, vec![SIDE, SIDE], bytes.into(), None)?.shared();
    store_as(&store, "model", &[small, large], 1, 2).await?;
    server.latency(LATENCY);
    let (mut first, mut trips) = (vec![], 0);
    for _ in 0..ROUNDS {
        server.clear_log();
        let started = Instant::now();
        let store = Store::open_with("s3://test/layers", options()).await?;
        store.seen().layer("model", &name(0)).await?.load().await?;
        first.push(started.elapsed());
        trips = trips.max(server.round_trips());
    }
    println!(
        "open and load the first layer: {:.0} ms, {trips} round trips of {} ms",
        median(first),
        LATENCY.as_millis()
    );
    let (mut loads, mut raws, mut parts) = (vec![], vec![], 0);
    for _ in 0..ROUNDS {
        let store = Store::open_with("s3://test/layers", options()).await?;
        let handle = store.seen().layer("model", &name(1)).await?;
        server.clear_log();
        let started = Instant::now();
        handle.load().await?;
        loads.push(started.elapsed());
        let seen = server.log();
        assert_eq!(round_trips(&seen), 1, "{seen:?}");
        parts = seen.len();
        raws.push(raw(&server, &seen).await?);
    }
    let mib = (4 * SIDE * SIDE) as f64 / (1 << 20) as f64;
    let (load, raw) = (median(loads), median(raws));
    println!(
        "load a layer of {mib:.0} MiB: {load:.0} ms ({:.0} MiB/s); its {parts} ranges alone: {raw:.0} ms ({:.0} MiB/s); {:.0} % of that",
        1e3 * mib / load,
        1e3 * mib / raw,
        100.0 * raw / load
    );
    Ok(())
}

/// Asks for what was asked for, all at once, and keeps it.
async fn raw(server: &Server, seen: &[Seen]) -> Result<Duration> {
    let client = reqwest::Client::builder().no_proxy().build()?;
    let get = async |seen: &Seen, range: &str| {
        let authorization = format!("AWS4-HMAC-SHA256 Credential={KEY_ID}/20260101/us-east-1/s3/aws4_request");
        let request = client.get(format!("{}/{}", server.endpoint, seen.key)).header("authorization", authorization);
        request.header("range", range).send().await?.bytes().await
    };
    // Connections are open, as those of the store are.
    try_join_all(seen.iter().map(|seen| get(seen, "bytes=0-0"))).await?;
    let started = Instant::now();
    let bodies = try_join_all(seen.iter().map(|seen| get(seen, seen.range.as_deref().unwrap_or_default()))).await?;
    let taken = started.elapsed();
    assert_eq!(
        bodies.iter().map(|body| body.len() as u64).sum::<u64>(),
        seen.iter().map(|seen| seen.sent).sum::<u64>()
    );
    Ok(taken)
}
