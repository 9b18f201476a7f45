//! Sums over rows in plain Rust: the reference, and what other processors run.

use super::{Element, Line, SparseRow};

/// See [`super::lines_of`].
pub fn lines_of<T: Element>(rows: &[T], width: usize, start: usize, lines: &mut [Line]) {
    for (line, row) in lines.iter_mut().zip(rows.chunks_exact(width)) {
        line.0.iter_mut().zip(&row[start..]).for_each(|(to, from)| *to = from.value());
    }
}

/// See [`super::sum_lines`].
pub fn sum_lines(lines: &[Line], weights: &[Vec<(u32, f32)>], y: &mut [Line]) {
    for (y, weights) in y.iter_mut().zip(weights) {
        y.0 = [0.0; 16];
        for &(line, weight) in weights {
            y.0.iter_mut().zip(&lines[line as usize].0).for_each(|(y, v)| *y += weight * v);
        }
    }
}

/// See [`super::dots`].
pub fn dots<T: Element>(rows: &[T], x: &[f32], out: &mut [f32]) {
    for (i, out) in out.iter_mut().enumerate() {
        let row = &rows[i * x.len()..(i + 1) * x.len()];
        *out = row.iter().zip(x).map(|(a, b)| a.value() * b).sum();
    }
}

/// See [`super::widen`].
pub fn widen<T: Element>(numbers: &[T], out: &mut [f32]) {
    out.iter_mut().zip(numbers).for_each(|(o, v)| *o = v.value());
}

/// See [`super::accumulate`].
pub fn accumulate<T: Element>(rows: &[T], width: usize, start: usize, weights: &SparseRow, y: &mut [f32]) {
    for &(row, weight) in weights {
        let row = &rows[row as usize * width + start..][..y.len()];
        y.iter_mut().zip(row).for_each(|(y, v)| *y += weight * v.value());
    }
}
