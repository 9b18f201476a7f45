//! Layers by numbers, in stores on the server.

use std::time::Duration;

use chrono::Utc;
use layerstore::layer::{DType, DenseLayer, Layer};
use layerstore::{ErrorBasis, LayerRecord, Provenance, RowLocations, Source, StorageOptions, Store, StoreOptions};

use crate::s3::{Act, Fault, KEY_ID, Kind, Nth, On, SECRET, Server};

/// How a store on the server is opened in this process.
pub fn options(server: &Server) -> StoreOptions {
    let storage_options = StorageOptions::new()
        .with("endpoint", &server.endpoint)
        .with("access_key_id", KEY_ID)
        .with("secret_access_key", SECRET)
        .with("region", "us-east-1");
    StoreOptions { storage_options, ..StoreOptions::default() }
}

/// Faults of puts under a condition, each of which may meet any of them.
pub fn troubles(seed: u64, on: Kind) -> Vec<Fault> {
    let acts = [
        Act::Answer(409),
        Act::Answer(503),
        Act::AnswerAfterApplying(503),
        Act::DieAfter,
        Act::DieBefore,
        Act::LateAnswer(Duration::from_millis(30)),
    ];
    let fault = |(place, act): (usize, Act)| Fault {
        on: On::Put(on.clone()),
        nth: Nth::Chance(seed + place as u64, 0.06),
        act,
    };
    acts.into_iter().enumerate().map(fault).collect()
}

/// A layer that no other number gives.
pub fn layer(number: u32) -> DenseLayer {
    let bytes: Vec<u8> = (0..16u32).flat_map(|i| (number.wrapping_mul(7919) + i).to_le_bytes()).collect();
    DenseLayer::new(DType::U8, vec![8, 8], bytes.into(), None).unwrap()
}

/// The catalogue's row of such a layer.
pub fn record(model: &str, name: &str, layer: &DenseLayer) -> LayerRecord {
    let parts = layer.to_parts();
    LayerRecord {
        model: model.into(),
        layer: name.into(),
        method: parts.method.clone(),
        in_features: 8,
        out_features: 8,
        artifact: parts.id(),
        relative_error: Some(0.0),
        error_basis: ErrorBasis::Weights,
        dense_bytes: 64,
        stored_bytes: parts.stored_bytes(),
        config: parts.config.clone(),
        source: Source::default(),
        created_at: Utc::now(),
        locations: RowLocations::default(),
    }
}

/// Puts one layer beside the others of a model, and returns the version.
pub async fn put(store: &Store, model: &str, name: &str, number: u32) -> layerstore::Result<u64> {
    let layer = layer(number);
    let parts = layer.to_parts();
    let mut writer = store.writer().await?;
    let provenance = Provenance { recipe: parts.id().0, relative_error: Some(0.0), error_basis: ErrorBasis::Weights };
    writer.add(&parts, provenance).await?;
    writer.commit_layers(model, &[record(model, name, &layer)], None).await
}

/// Asserts that a store is whole.
pub async fn sound(store: &Store) {
    let report = store.verify(|_, _| ()).await.unwrap();
    assert!(report.is_sound(), "{report:?}");
}
