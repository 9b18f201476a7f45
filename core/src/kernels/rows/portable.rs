//! Sums over rows in plain Rust: the reference, and what other processors run.

use super::element::{Element, Line, SparseRow};

/// See [`super::lines_of`].
pub fn lines_of<T: Element>(rows: &[T], width: usize, start: usize, lines: &mut [Line]) {
    let mut number = 0;
    while number < lines.len() {
        let (line, row) = (&mut lines[number].0, &rows[number * width + start..(number + 1) * width]);
        let mut i = 0;
        while i < row.len() && i < 16 {
            line[i] = row[i].value();
            i += 1;
        }
        number += 1;
    }
}

/// See [`super::sum_lines`].
pub fn sum_lines(lines: &[Line], weights: &[Vec<(u32, f32)>], y: &mut [Line]) {
    let mut q = 0;
    while q < weights.len() {
        let (pairs, mut sum, mut pair) = (&weights[q][..], [0f32; 16], 0);
        while pair < pairs.len() {
            let (line, weight) = (&lines[pairs[pair].0 as usize].0, pairs[pair].1);
            let mut i = 0;
            while i < 16 {
                sum[i] += weight * line[i];
                i += 1;
            }
            pair += 1;
        }
        y[q].0 = sum;
        q += 1;
    }
}

/// See [`super::dots`].
pub fn dots<T: Element>(rows: &[T], x: &[f32], out: &mut [f32]) {
    let mut number = 0;
    while number < out.len() {
        let row = &rows[number * x.len()..(number + 1) * x.len()];
        let (mut sum, mut i) = (-0f32, 0);
        while i < row.len() && i < x.len() {
            sum += row[i].value() * x[i];
            i += 1;
        }
        out[number] = sum;
        number += 1;
    }
}

/// See [`super::widen`].
pub fn widen<T: Element>(numbers: &[T], out: &mut [f32]) {
    let mut i = 0;
    while i < numbers.len() && i < out.len() {
        out[i] = numbers[i].value();
        i += 1;
    }
}

/// See [`super::accumulate`].
pub fn accumulate<T: Element>(rows: &[T], width: usize, start: usize, weights: &SparseRow, y: &mut [f32]) {
    let mut pair = 0;
    while pair < weights.len() {
        let (number, weight) = weights[pair];
        let row = &rows[number as usize * width + start..][..y.len()];
        let mut i = 0;
        while i < row.len() && i < y.len() {
            y[i] += weight * row[i].value();
            i += 1;
        }
        pair += 1;
    }
}
