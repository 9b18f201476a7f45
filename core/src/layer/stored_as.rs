//! Layers whose tensor is seen in another way than its checkpoint holds it: one matrix of several, transposed, or some of the rows.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// How the tensor that a layer takes lies in the tensor that its checkpoint holds: of the tensor there, one `expert` is chosen, then
/// it is `transposed`, then some `rows` are taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredAs {
    /// The tensor's name in the checkpoint.
    pub tensor: String,
    /// Its dimensions there.
    pub shape: Vec<usize>,
    /// The place along the first dimension that is taken, where it is one of several matrices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expert: Option<usize>,
    /// Whether columns there are the layer's rows.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub transposed: bool,
    /// The first of the rows that are taken, and the one behind the last, where they are some of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<(usize, usize)>,
}

impl StoredAs {
    /// Returns the whole of a tensor, as it is.
    pub fn whole(tensor: &str, shape: &[usize]) -> Self {
        StoredAs { tensor: tensor.to_owned(), shape: shape.to_vec(), expert: None, transposed: false, rows: None }
    }

    /// Returns whether it is the whole tensor, as it is.
    pub fn is_whole(&self) -> bool {
        self.expert.is_none() && !self.transposed && self.rows.is_none()
    }

    /// Returns the dimensions that the layer sees.
    ///
    /// # Errors
    /// When the tensor has no such part.
    pub fn seen(&self) -> Result<Vec<usize>> {
        let wrong = |expected: &str| {
            let found = format!(
                "expert {:?}, transposed {}, rows {:?} of shape {:?}",
                self.expert, self.transposed, self.rows, self.shape
            );
            Error::expected(format!("part of tensor '{}'", self.tensor), found, expected)
        };
        let mut seen = self.shape.clone();
        if let Some(expert) = self.expert {
            if seen.len() < 2 || expert >= seen[0] {
                return Err(wrong("an expert that is there"));
            }
            seen.remove(0);
        }
        if self.transposed {
            match seen[..] {
                [_, _] => seen.swap(0, 1),
                _ => return Err(wrong("a matrix to transpose")),
            }
        }
        if let Some((first, end)) = self.rows {
            if seen.is_empty() || first >= end || end > seen[0] {
                return Err(wrong("rows that are there"));
            }
            seen[0] = end - first;
        }
        Ok(seen)
    }

    /// Returns the same part of a tensor that is itself a part, as `within` says.
    ///
    /// # Errors
    /// When the two together are no such part: two transpositions, or an expert of rows.
    pub fn within(&self, within: &StoredAs) -> Result<Self> {
        let stacked = || {
            let found = format!("{self:?} of {within:?}");
            Error::expected(format!("part of tensor '{}'", self.tensor), found, "one that is seen in one way")
        };
        if (self.expert.is_some() && !within.is_whole())
            || (self.transposed && (within.transposed || within.rows.is_some()))
        {
            return Err(stacked());
        }
        let rows = match (within.rows, self.rows) {
            (Some((first, _)), Some((own, end))) => Some((first + own, first + end)),
            (theirs, own) => own.or(theirs),
        };
        Ok(StoredAs {
            tensor: within.tensor.clone(),
            shape: within.shape.clone(),
            expert: self.expert.or(within.expert),
            transposed: self.transposed || within.transposed,
            rows,
        })
    }

    /// Returns the bytes of the stored tensor that have to be read, of so many for an element.
    ///
    /// # Errors
    /// As [`StoredAs::seen`].
    pub fn bytes(&self, element: usize) -> Result<Range<usize>> {
        self.seen()?;
        let (skipped, inner) = match self.expert {
            None => (0, &self.shape[..]),
            Some(expert) => (expert * self.shape[1..].iter().product::<usize>(), &self.shape[1..]),
        };
        let row = inner.iter().skip(1).product::<usize>();
        let whole = inner.iter().product::<usize>();
        let (first, end) = match self.rows.filter(|_| !self.transposed) {
            Some((first, end)) => (first * row, end * row),
            None => (0, whole),
        };
        Ok(element * (skipped + first)..element * (skipped + end))
    }

    /// Returns what the layer sees, of the bytes that [`StoredAs::bytes`] names.
    ///
    /// # Errors
    /// As [`StoredAs::seen`].
    pub fn taken(&self, element: usize, read: Vec<u8>) -> Result<Vec<u8>> {
        if !self.transposed {
            return Ok(read);
        }
        let seen = self.seen()?;
        let mut all = Vec::with_capacity(seen.iter().product::<usize>() * element);
        self.each_transposed(&seen, |place| all.extend_from_slice(&read[place * element..(place + 1) * element]));
        Ok(all)
    }

    /// Puts what the layer sees where it belongs in the bytes of the stored tensor.
    ///
    /// # Errors
    /// As [`StoredAs::seen`], and when there are not as many bytes as the shapes say.
    pub fn put(&self, element: usize, seen: &[u8], stored: &mut [u8]) -> Result<()> {
        let shape = self.seen()?;
        let range = self.bytes(element)?;
        let expected = shape.iter().product::<usize>() * element;
        if seen.len() != expected || range.end > stored.len() {
            let found = format!("{} of {}", seen.len(), stored.len());
            return Err(Error::expected(format!("bytes of tensor '{}'", self.tensor), found, expected));
        }
        let stored = &mut stored[range];
        if !self.transposed {
            stored.copy_from_slice(seen);
            return Ok(());
        }
        let mut elements = seen.chunks_exact(element);
        self.each_transposed(&shape, |place| {
            let element_bytes = elements.next().unwrap_or_default();
            stored[place * element..(place + 1) * element].copy_from_slice(element_bytes);
        });
        Ok(())
    }

    /// Calls `f` with the place in the stored matrix of each element that the layer sees, in its order.
    fn each_transposed(&self, seen: &[usize], mut f: impl FnMut(usize)) {
        let first = self.rows.map_or(0, |(first, _)| first);
        // Columns of the stored matrix: all rows of the one that is seen.
        let width = self.shape.last().copied().unwrap_or_default();
        for row in 0..seen[0] {
            (0..seen[1]).for_each(|column| f(column * width + first + row));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(shape: &[usize]) -> StoredAs {
        StoredAs::whole("t", shape)
    }

    #[test]
    fn parts_are_those_that_ndarray_sees() {
        use ndarray::{Array3, s};
        let whole = Array3::from_shape_fn((3, 4, 5), |(e, i, j)| (100 * e + 10 * i + j) as u8);
        let bytes: Vec<u8> = whole.iter().copied().collect();
        let seen = |view: &StoredAs| {
            let read = bytes[view.bytes(1).unwrap()].to_vec();
            view.taken(1, read).unwrap()
        };
        let expert = StoredAs { expert: Some(2), ..of(&[3, 4, 5]) };
        assert_eq!(seen(&expert), whole.slice(s![2, .., ..]).iter().copied().collect::<Vec<_>>());
        let rows = StoredAs { rows: Some((1, 3)), ..expert.clone() };
        assert_eq!(seen(&rows), whole.slice(s![2, 1..3, ..]).iter().copied().collect::<Vec<_>>());
        let transposed = StoredAs { transposed: true, ..rows };
        assert_eq!(seen(&transposed), whole.slice(s![2, .., 1..3]).t().iter().copied().collect::<Vec<_>>());
        assert_eq!(transposed.seen().unwrap(), [2, 4]);
    }

    #[test]
    fn what_is_not_there_is_refused() {
        for wrong in [
            StoredAs { expert: Some(3), ..of(&[3, 4, 5]) },
            StoredAs { expert: Some(0), ..of(&[3]) },
            StoredAs { transposed: true, ..of(&[3, 4, 5]) },
            StoredAs { rows: Some((2, 5)), ..of(&[4, 5]) },
            StoredAs { rows: Some((2, 2)), ..of(&[4, 5]) },
            StoredAs { rows: Some((0, 1)), ..of(&[]) },
        ] {
            assert!(wrong.seen().is_err(), "{wrong:?}");
        }
        let transposed = StoredAs { transposed: true, ..of(&[4, 5]) };
        assert!(transposed.within(&transposed).is_err());
        assert!(StoredAs { expert: Some(0), ..of(&[4, 5]) }.within(&transposed).is_err());
    }

    proptest! {
        /// What is put back is what was taken, and a part of a part is the part of both.
        #[test]
        fn parts_come_back(
            shape in prop::collection::vec(1usize..6, 2..4), expert in any::<prop::sample::Index>(), transposed: bool,
            (first, length) in (0usize..5, 1usize..5), (inner, some) in (0usize..3, 1usize..3), element in 1usize..5,
        ) {
            let mut view = of(&shape);
            if shape.len() == 3 {
                view.expert = Some(expert.index(shape[0]));
            }
            view.transposed = transposed;
            let rows = view.seen().unwrap()[0];
            if first + length <= rows {
                view.rows = Some((first, first + length));
            }
            let stored: Vec<u8> = (0..shape.iter().product::<usize>() * element).map(|i| i as u8).collect();
            let take = |view: &StoredAs, from: &[u8]| {
                view.taken(element, from[view.bytes(element).unwrap()].to_vec()).unwrap()
            };
            let seen = take(&view, &stored);
            let mut back = vec![0; stored.len()];
            view.put(element, &seen, &mut back).unwrap();
            prop_assert_eq!(&take(&view, &back), &seen);
            let shape = view.seen().unwrap();
            if inner + some <= shape[0] {
                let outer = StoredAs { rows: Some((inner, inner + some)), ..of(&shape) };
                let both = outer.within(&view).unwrap();
                prop_assert_eq!(take(&both, &stored), take(&outer, &seen));
            }
        }
    }
}
