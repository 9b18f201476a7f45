//! Columns that are stored by their groups, in an order of their own.

/// Returns which column each stored column is, so that those of a group lie side by side, where each of `count` groups has as many: no
/// columns where they are in order already. `None` where groups are not so.
pub fn by_groups(groups: &[u32], columns: usize, count: usize) -> Option<Vec<u32>> {
    if groups.len() != columns || count == 0 {
        return None;
    }
    let each = columns / count;
    let mut order: Vec<u32> = (0..columns as u32).collect();
    order.sort_by_key(|&column| groups[column as usize]);
    let fits = order.iter().enumerate().all(|(place, &column)| groups[column as usize] as usize == place / each.max(1));
    let in_order = order.iter().enumerate().all(|(place, &column)| place == column as usize);
    fits.then(|| if in_order { vec![] } else { order })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_go_to_their_groups() {
        assert_eq!(by_groups(&[1, 0, 1, 0], 4, 2), Some(vec![1, 3, 0, 2]));
        assert_eq!(by_groups(&[0, 0, 1, 1], 4, 2), Some(vec![]));
        for (groups, count) in [(&[0, 0, 0, 1][..], 2), (&[0, 2, 0, 2], 2), (&[0, 1], 2), (&[0; 4], 0)] {
            assert_eq!(by_groups(groups, 4, count), None, "{groups:?}");
        }
    }
}
