//! How a row's codes lie in registers, and where their scales are.

/// How a row's codes lie in registers.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    /// Columns of the matrix.
    pub columns: usize,
    /// Columns that share a scale.
    pub group: usize,
    /// Lanes of a register.
    pub lanes: usize,
    /// Registers of bytes that a block's codes fill, each byte of a lane in another.
    pub halves: usize,
}

/// Where a block's scales are: lane i's is the `i`th number's in its window.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
#[expect(dead_code, reason = "read through a pointer")]
pub struct Places([u32; 16]);

/// Blocks that follow each other and have their scales among the same groups, no more than a register holds.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    /// The first group.
    pub first: usize,
    /// Groups.
    pub count: usize,
    /// Blocks.
    pub blocks: usize,
    /// Bytes of a row's codes in each block: fewer than a block's in a row's last one, which is then by itself.
    pub bytes: usize,
}

/// All blocks of a row.
#[derive(Debug)]
pub struct Blocks {
    /// One for each block.
    pub places: Vec<Places>,
    /// In the order of the row; their blocks are as many as `places`.
    pub windows: Vec<Window>,
}

/// How the rows of a matrix lie in a device's registers.
#[derive(Debug)]
pub struct Plan {
    /// Where codes and scales are.
    pub(super) layout: Layout,
    /// The blocks of a row.
    pub(super) blocks: Blocks,
}

impl Layout {
    /// Returns the layout for registers of so many lanes; `None` if the lanes do not each belong to one group.
    pub fn new(columns: usize, group: usize, bits: u32, lanes: usize) -> Option<Self> {
        let preferred = match bits {
            2 => 4,
            4 => 2,
            _ => 1,
        };
        let fits = |halves: usize| group >= columns || group.is_multiple_of(4 * halves);
        let halves = [preferred, 1].into_iter().find(|&halves| fits(halves))?;
        Some(Layout { columns, group: group.max(1), lanes, halves })
    }

    /// Returns how many codes a lane has.
    pub fn lane_codes(&self) -> usize {
        4 * self.halves
    }

    /// Returns how many codes a block has.
    pub fn block_codes(&self) -> usize {
        self.lanes * self.lane_codes()
    }

    /// Returns how many blocks a row has.
    pub fn block_count(&self) -> usize {
        self.columns.div_ceil(self.block_codes())
    }

    /// Returns how many groups a row has.
    pub fn groups(&self) -> usize {
        self.columns.div_ceil(self.group)
    }

    /// Returns the blocks of rows of so many bytes.
    pub fn blocks(&self, row_bytes: usize, block_bytes: usize) -> Blocks {
        let group_of = |code: usize| code.min(self.columns - 1) / self.group;
        let mut all = Blocks { places: vec![], windows: vec![] };
        for number in 0..self.block_count() {
            let lane =
                |lane: usize| group_of(number * self.block_codes() + lane.min(self.lanes - 1) * self.lane_codes());
            let bytes = (row_bytes - number * block_bytes).min(block_bytes);
            let window = match all.windows.last_mut() {
                Some(last) if lane(self.lanes) < last.first + self.lanes && bytes == last.bytes => last,
                _ => {
                    let first = lane(0);
                    let count = (self.groups() - first).min(self.lanes);
                    all.windows.push(Window { first, count, blocks: 0, bytes });
                    all.windows.last_mut().expect("just put there")
                }
            };
            window.blocks += 1;
            let first = window.first;
            all.places.push(Places(std::array::from_fn(|i| (lane(i) - first) as u32)));
        }
        all
    }
}
