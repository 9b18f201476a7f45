//! Attention over lengths: exact, by codes, and HyperAttention. `make bench`, or `cargo bench --bench attention`; arguments are
//! lengths (`cargo bench --bench attention -- 4096 65536`).
//!
//! One sequence of clustered queries and keys, as trained attention has them. Times are of whole calls, finding codes included:
//! medians of three, or single ones above a second; beyond 16,384 tokens exact attention is not run, and its time (marked ~) is
//! that of 16,384 times the square of how many times longer the sequence is. Its rate is of multiply-adds of visible pairs,
//! beside a matrix product of faer's (2048 × 2048 × 2048) in the same run. Errors are relative, against exact attention of 64
//! queries from all over the sequence. Memory is what a call has at most, beside its inputs and with its output.

mod dense;

use std::alloc::{GlobalAlloc, Layout, System};
use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use layerstore_core::attention::{
    AttentionCodebook, AttentionMask, AttentionOutput, CompressedCache, HyperAttention, VqAttention, exact,
};
use layerstore_core::linalg::matmul;
use ndarray::{Array4, ArrayView4, s};

use dense::matrix;

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

const CODES: usize = 512;

const BLOCK: usize = 128;

/// Beyond this exact attention is not run.
const EXACT_UP_TO: usize = 16_384;

/// Queries whose error is measured.
const MEASURED: usize = 64;

/// Counts what is allocated.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the system's allocator, and counters beside it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        MOST.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        MOST.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn main() -> Result<()> {
    // `cargo test` also runs bench targets: measuring is for `cargo bench` alone.
    if !std::env::args().any(|a| a == "--bench") {
        return Ok(());
    }
    let named: Vec<usize> = std::env::args().filter_map(|a| a.parse().ok()).collect();
    let lengths = if named.is_empty() { (10..=18).step_by(2).map(|p| 1 << p).collect() } else { named };
    let (a, b) = (matrix(2048, 2048, 1), matrix(2048, 2048, 2));
    let rate = 2048f64.powi(3) / seconds(|| black_box(matmul(black_box(a.view()), b.view())));
    // Threads that are started once are not of any call.
    let small = clustered(1, 2048, 64, 5);
    exact(small.view(), small.view(), small.view(), 0.1, &AttentionMask::default())?;
    println!(
        "matrix product: {:.1} GFLOP/s. {CODES} codes, blocks of {BLOCK}; {:?}",
        2e-9 * rate,
        HyperAttention::default()
    );
    println!(
        "{:>30} | {:>30} | codes of queries and keys{:14} | codes of keys{:26} | HyperAttention",
        "", "exact", "", ""
    );
    let columns = format!("{:>9} {:>6} {:>7} {:>6} {:>7}", "ms", "ns/tok", "× exact", "error", "MiB");
    println!(
        "heads dim causal {:>13} | {:>10} {:>11} {:>7} | {columns} | {columns} | {columns}",
        "tokens", "ms", "of product", "MiB"
    );
    for (heads, dim) in [(1, 64), (8, 64), (1, 128), (8, 128)] {
        for causal in [false, true] {
            let mut known = None;
            for &tokens in &lengths {
                row(heads, dim, causal, tokens, rate, &mut known)?;
            }
        }
    }
    Ok(())
}

fn seconds<T>(mut run: impl FnMut() -> T) -> f64 {
    let mut times = vec![];
    while times.len() < 3 && times.first().is_none_or(|first| *first < 1.0) {
        let started = Instant::now();
        black_box(run());
        times.push(started.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// What a call allocates at most, in MiB.
fn memory<T>(run: impl FnOnce() -> T) -> (T, f64) {
    let before = NOW.load(Ordering::Relaxed);
    MOST.store(before, Ordering::Relaxed);
    let found = run();
    (found, (MOST.load(Ordering::Relaxed) - before) as f64 / f64::from(1 << 20))
}

/// 64 clusters for all heads, noise of 0.3 around them.
fn clustered(heads: usize, tokens: usize, dim: usize, seed: u64) -> Array4<f32> {
    let centres = matrix(64, dim, 99) * 1.7;
    let noise = matrix(heads * tokens, dim, seed) * 0.5;
    Array4::from_shape_fn((1, heads, tokens, dim), |(_, h, t, d)| {
        let cluster = (h * tokens + t).wrapping_mul(2_654_435_761 + seed as usize) >> 7;
        centres[[cluster % 64, d]] + noise[[h * tokens + t, d]]
    })
}

fn book(x: ArrayView4<f32>) -> Result<AttentionCodebook> {
    let step = (x.dim().2 / 4096).max(1);
    let some = x.slice(s![0, .., ..;step, ..]);
    Ok(AttentionCodebook::by_kmeans(some, CODES.min(some.dim().1), 0)?)
}

/// Exact outputs of some queries, and which they are.
fn measured(
    q: ArrayView4<f32>,
    k: ArrayView4<f32>,
    v: ArrayView4<f32>,
    scale: f32,
    causal: bool,
) -> Result<Vec<(usize, Array4<f32>)>> {
    let tokens = q.dim().2;
    let places = (0..MEASURED).map(|i| (2 * i + 1) * tokens / (2 * MEASURED));
    let one = |place: usize| {
        let seen = if causal { place + 1 } else { tokens };
        let (k, v) = (k.slice(s![.., .., ..seen, ..]), v.slice(s![.., .., ..seen, ..]));
        let found = exact(q.slice(s![.., .., place..=place, ..]), k, v, scale, &AttentionMask::default())?;
        Ok((place, found.output))
    };
    places.map(one).collect()
}

fn error(found: &AttentionOutput, expected: &[(usize, Array4<f32>)]) -> f64 {
    let (mut off, mut all) = (0f64, 0f64);
    for (place, expected) in expected {
        for (found, expected) in found.output.slice(s![.., .., *place..=*place, ..]).iter().zip(expected) {
            off += f64::from(found - expected).powi(2);
            all += f64::from(*expected).powi(2);
        }
    }
    (off / all).sqrt()
}

fn row(
    heads: usize,
    dim: usize,
    causal: bool,
    tokens: usize,
    rate: f64,
    known: &mut Option<(usize, f64)>,
) -> Result<()> {
    let (q, k) = (clustered(heads, tokens, dim, 1), clustered(heads, tokens, dim, 2));
    let v =
        Array4::from_shape_vec((1, heads, tokens, dim), matrix(heads * tokens, dim, 3).into_raw_vec_and_offset().0)?;
    let scale = 1.0 / (dim as f32).sqrt();
    let (of_queries, of_keys) = (book(q.view())?, book(k.view())?);
    let mask = AttentionMask { causal, ..AttentionMask::default() };
    let mut line = format!("{heads:>5} {dim:>3} {causal:>6} {tokens:>13} |");
    let of_exact = if tokens <= EXACT_UP_TO {
        let run = || exact(q.view(), k.view(), v.view(), scale, &mask);
        let (found, most) = memory(run);
        found?;
        let time = seconds(run);
        let pairs = (tokens * tokens) as f64 / if causal { 2.0 } else { 1.0 };
        let of_product = heads as f64 * pairs * 2.0 * dim as f64 / time / rate;
        line += &format!("{:>11.1} {of_product:>10.2}× {most:>7.1} |", 1e3 * time);
        *known = Some((tokens, time));
        Some(time)
    } else {
        // Of the longest that was measured.
        let time = known.map(|(measured, time)| time * (tokens as f64 / measured as f64).powi(2));
        line += &format!("{:>11} {:>11} {:>7} |", time.map_or("-".into(), |t| format!("~{:.0}", 1e3 * t)), "", "");
        time
    };
    let expected = measured(q.view(), k.view(), v.view(), scale, causal)?;
    let hyper = HyperAttention::default();
    let coded = |queries| {
        let attention = VqAttention::new(&of_keys, queries, scale, BLOCK);
        match causal {
            true => attention.causal(
                q.view(),
                k.view(),
                v.view(),
                &mut CompressedCache::new(1, heads, of_keys.codes(), dim),
            ),
            false => attention.bidirectional(q.view(), k.view(), v.view(), &mask),
        }
    };
    let runs: [&dyn Fn() -> layerstore_core::Result<AttentionOutput>; 3] =
        [&|| coded(Some(&of_queries)), &|| coded(None), &|| hyper.attend(q.view(), k.view(), v.view(), scale, causal)];
    for run in runs {
        let (found, most) = memory(run);
        let error = error(&found?, &expected);
        let time = seconds(run);
        let times = of_exact.map_or("-".into(), |exact| format!("{:.1}×", exact / time));
        let each = 1e9 * time / (heads * tokens) as f64;
        line += &format!(" {:>9.1} {each:>6.0} {times:>7} {error:>6.3} {most:>7.1} |", 1e3 * time);
    }
    println!("{}", line.trim_end_matches(" |"));
    Ok(())
}
