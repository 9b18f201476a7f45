//! Pages: rows of a column that were written together, as a file's description gives them.

use std::io;
use std::ops::Range;

use bytes::Bytes;
use lance_encoding::format::metadata::PageLayout;
use lance_encoding::format::pb21;
use lance_file::format::pbfile;
use prost::Message;

/// Rows of a column that were written together.
#[derive(Debug)]
pub struct Page {
    /// How many rows there are.
    pub rows: u64,
    /// How their values are laid out.
    pub layout: PageLayout,
    /// The bytes of the file that hold them.
    pub buffers: Vec<Range<u64>>,
}

impl Page {
    /// Decodes the description of a page.
    ///
    /// # Errors
    /// When it contradicts itself.
    pub fn decode(page: pbfile::column_metadata::Page) -> io::Result<Self> {
        let Some(pbfile::encoding::Location::Direct(encoding)) = page.encoding.and_then(|e| e.location) else {
            return Err(contradiction("a page's layout is not with the page's description"));
        };
        let layout = prost_types::Any::decode(Bytes::from(encoding.encoding))?;
        let layout = layout.to_msg::<pb21::PageLayout>()?.into();
        if page.buffer_offsets.len() != page.buffer_sizes.len() {
            return Err(contradiction("a page's buffers are not as many as their sizes"));
        }
        let buffers = page.buffer_offsets.into_iter().zip(page.buffer_sizes).map(range);
        Ok(Page { rows: page.length, layout, buffers: buffers.collect::<io::Result<_>>()? })
    }
}

/// Returns the range of an offset and a size.
///
/// # Errors
/// When it ends beyond what 64 bits count.
pub fn range((start, size): (u64, u64)) -> io::Result<Range<u64>> {
    Ok(start..start.checked_add(size).ok_or_else(|| contradiction("an offset overflows"))?)
}

/// Returns the error of a file whose description does not fit its bytes, or itself.
pub fn contradiction(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the file contradicts itself: {what}"))
}
