//! How often each cluster of the file is referred to, and by what.
//!
//! Memory follows the number of references found, never a number that the image states: a page of 64 Ki clusters exists
//! once something in it is referred to, and takes eight bytes for each such cluster until it is worth an array.

use std::collections::BTreeMap;

/// Clusters of a page are 1 << this.
const PAGE_BITS: u32 = 16;
/// Clusters of a page.
pub const PAGE: u64 = 1 << PAGE_BITS;
/// A list of so many clusters becomes an array.
const LIST: usize = 1024;

/// What a cluster is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Use {
    /// Nothing.
    Free,
    /// The header.
    Header,
    /// The active L1 table.
    L1,
    /// An L2 table.
    L2,
    /// Bytes of the device, or the guest's state.
    Data,
    /// The refcount table.
    RefcountTable,
    /// A refcount block.
    RefcountBlock,
    /// The snapshot table.
    SnapshotTable,
    /// The L1 table of a snapshot.
    SnapshotL1,
    /// Directory, table or bits of bitmaps.
    Bitmap,
    /// The header of the encryption.
    Encryption,
    /// QEMU's zone table.
    ZoneTable,
    /// What the caller named.
    Area,
    /// Several kinds of metadata.
    Clash,
}

const USES: [Use; 14] = [
    Use::Free,
    Use::Header,
    Use::L1,
    Use::L2,
    Use::Data,
    Use::RefcountTable,
    Use::RefcountBlock,
    Use::SnapshotTable,
    Use::SnapshotL1,
    Use::Bitmap,
    Use::Encryption,
    Use::ZoneTable,
    Use::Area,
    Use::Clash,
];

impl Use {
    /// For messages.
    pub fn name(self) -> &'static str {
        match self {
            Use::Free => "free space",
            Use::Header => "the header",
            Use::L1 => "the active L1 table",
            Use::L2 => "an L2 table",
            Use::Data => "data",
            Use::RefcountTable => "the refcount table",
            Use::RefcountBlock => "a refcount block",
            Use::SnapshotTable => "the snapshot table",
            Use::SnapshotL1 => "the L1 table of a snapshot",
            Use::Bitmap => "bitmaps",
            Use::Encryption => "the encryption header",
            Use::ZoneTable => "the zone table",
            Use::Area => "an area of an extension",
            Use::Clash => "several things",
        }
    }

    /// Whether a cluster may be used for both: snapshots share L2 tables and data, everything else is used once.
    fn goes_with(self, other: Use) -> bool {
        self == Use::Free || matches!((self, other), (Use::L2, Use::L2) | (Use::Data, Use::Data))
    }

    /// What counts of two uses: metadata before data, since that is what a repair may write. The refcount structure,
    /// which can be built anew elsewhere, comes last.
    fn over(self, later: Use) -> Use {
        match (self, later) {
            (Use::Free | Use::Data, _) => later,
            (_, Use::Data | Use::RefcountTable | Use::RefcountBlock) => self,
            _ if self.goes_with(later) => self,
            _ => Use::Clash,
        }
    }
}

/// The references found so far.
#[derive(Default)]
pub struct Counts {
    numbers: BTreeMap<u64, usize>,
    pages: Vec<Page>,
    /// The page used last, and where it is.
    last: Option<(u64, usize)>,
}

enum Page {
    /// Sorted by cluster.
    List(Vec<(u16, Use, u32)>),
    /// Counts up to 255.
    Narrow { counts: Box<[u8]>, uses: Uses },
    /// Any count.
    Wide { counts: Box<[u32]>, uses: Uses },
}

/// A use for each cluster of a page, four bits each.
struct Uses(Box<[u8]>);

impl Counts {
    /// Notes `times` references to a cluster. Returns the earlier use that this one contradicts.
    pub fn add(&mut self, cluster: u64, times: u32, for_what: Use) -> Option<Use> {
        let number = cluster >> PAGE_BITS;
        let place = match self.last {
            Some((last, place)) if last == number => place,
            _ => *self.numbers.entry(number).or_insert_with(|| {
                self.pages.push(Page::List(Vec::new()));
                self.pages.len() - 1
            }),
        };
        self.last = Some((number, place));
        self.pages[place].add(cluster as u16, times, for_what)
    }

    /// Takes one reference back.
    pub fn remove(&mut self, cluster: u64) {
        if let Some(page) = self.numbers.get(&(cluster >> PAGE_BITS)) {
            self.pages[*page].decrease(cluster as u16);
        }
    }

    /// References to a cluster.
    pub fn get(&self, cluster: u64) -> u64 {
        self.page(cluster).map_or(0, |page| page.get(cluster as u16).0)
    }

    /// What a cluster is used for.
    pub fn used_for(&self, cluster: u64) -> Use {
        self.page(cluster)
            .map_or(Use::Free, |page| page.get(cluster as u16).1)
    }

    /// First clusters of the pages that have references, rising.
    pub fn pages(&self) -> impl DoubleEndedIterator<Item = u64> {
        self.numbers.keys().map(|number| number << PAGE_BITS)
    }

    /// The clusters of a range that have references, rising.
    pub fn referenced(&self, range: std::ops::Range<u64>) -> impl Iterator<Item = u64> {
        self.numbers
            .range(range.start >> PAGE_BITS..=range.end.saturating_sub(1) >> PAGE_BITS)
            .flat_map(move |(number, page)| {
                let first = number << PAGE_BITS;
                let from = range.start.max(first);
                let to = range.end.min(first + PAGE);
                self.pages[*page].referenced((from - first) as u32..to.saturating_sub(first) as u32, first)
            })
    }

    /// The last cluster with references.
    pub fn highest(&self) -> Option<u64> {
        self.pages()
            .rev()
            .find_map(|first| self.referenced(first..first + PAGE).last())
    }

    fn page(&self, cluster: u64) -> Option<&Page> {
        let number = cluster >> PAGE_BITS;
        match self.last {
            Some((last, page)) if last == number => Some(&self.pages[page]),
            _ => self.numbers.get(&number).map(|page| &self.pages[*page]),
        }
    }
}

impl Page {
    fn get(&self, index: u16) -> (u64, Use) {
        match self {
            Page::List(list) => match list.binary_search_by_key(&index, |item| item.0) {
                Ok(place) => (u64::from(list[place].2), list[place].1),
                Err(_) => (0, Use::Free),
            },
            Page::Narrow { counts, uses } => (u64::from(counts[usize::from(index)]), uses.get(index)),
            Page::Wide { counts, uses } => (u64::from(counts[usize::from(index)]), uses.get(index)),
        }
    }

    fn add(&mut self, index: u16, times: u32, for_what: Use) -> Option<Use> {
        let (count, before) = self.get(index);
        let count = u32::try_from(count + u64::from(times)).unwrap_or(u32::MAX);
        self.set(index, count, before.over(for_what));
        (!before.goes_with(for_what)).then_some(before)
    }

    fn decrease(&mut self, index: u16) {
        let (count, before) = self.get(index);
        if count > 0 {
            self.set(index, count as u32 - 1, before);
        }
    }

    fn set(&mut self, index: u16, count: u32, for_what: Use) {
        match self {
            Page::List(list) => match list.binary_search_by_key(&index, |item| item.0) {
                Ok(place) => list[place] = (index, for_what, count),
                Err(place) if list.len() < LIST => list.insert(place, (index, for_what, count)),
                Err(_) => {
                    self.widen();
                    self.set(index, count, for_what);
                }
            },
            Page::Narrow { counts, uses } => match u8::try_from(count) {
                Ok(count) => {
                    counts[usize::from(index)] = count;
                    uses.set(index, for_what);
                }
                Err(_) => {
                    self.widen();
                    self.set(index, count, for_what);
                }
            },
            Page::Wide { counts, uses } => {
                counts[usize::from(index)] = count;
                uses.set(index, for_what);
            }
        }
    }

    /// A list becomes an array, an array of bytes one of words.
    fn widen(&mut self) {
        let wider = match self {
            Page::List(list) => {
                let mut page = Page::Narrow {
                    counts: vec![0; PAGE as usize].into(),
                    uses: Uses(vec![0; PAGE as usize / 2].into()),
                };
                for (index, for_what, count) in list.drain(..) {
                    page.set(index, count, for_what);
                }
                page
            }
            Page::Narrow { counts, uses } => Page::Wide {
                counts: counts.iter().map(|count| u32::from(*count)).collect(),
                uses: Uses(std::mem::take(&mut uses.0)),
            },
            Page::Wide { .. } => return,
        };
        *self = wider;
    }

    fn referenced(&self, range: std::ops::Range<u32>, first: u64) -> Box<dyn Iterator<Item = u64> + '_> {
        match self {
            Page::List(list) => Box::new(
                list.iter()
                    .filter(move |item| range.contains(&u32::from(item.0)) && item.2 > 0)
                    .map(move |item| first + u64::from(item.0)),
            ),
            _ => Box::new(
                range
                    .filter(|index| self.get(*index as u16).0 > 0)
                    .map(move |index| first + u64::from(index)),
            ),
        }
    }
}

impl Uses {
    fn get(&self, index: u16) -> Use {
        let both = self.0[usize::from(index / 2)];
        USES[usize::from(both >> (index % 2 * 4) & 15)]
    }

    fn set(&mut self, index: u16, for_what: Use) {
        let shift = index % 2 * 4;
        let both = &mut self.0[usize::from(index / 2)];
        *both = *both & !(15 << shift) | (for_what as u8) << shift;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn each_use_keeps_its_number() {
        for (number, for_what) in USES.into_iter().enumerate() {
            assert_eq!(for_what as usize, number);
        }
    }

    #[test]
    fn only_l2_tables_and_data_are_shared() {
        let mut counts = Counts::default();
        assert_eq!(counts.add(5, 1, Use::Data), None);
        assert_eq!(counts.add(5, 3, Use::Data), None);
        assert_eq!(counts.add(6, 2, Use::L2), None);
        assert_eq!(counts.add(6, 1, Use::Data), Some(Use::L2));
        assert_eq!(counts.used_for(6), Use::L2);
        assert_eq!(counts.add(7, 1, Use::L1), None);
        assert_eq!(counts.add(7, 1, Use::L1), Some(Use::L1));
        assert_eq!(counts.used_for(7), Use::Clash);
        assert_eq!(counts.add(6, 1, Use::RefcountBlock), Some(Use::L2));
        assert_eq!(counts.used_for(6), Use::L2);
        assert_eq!(counts.get(5), 4);
        assert_eq!(counts.highest(), Some(7));
    }

    #[test]
    fn many_references_are_counted_and_end_at_the_widest_number() {
        let mut counts = Counts::default();
        for cluster in 0..2000 {
            counts.add(cluster, 200, Use::Data);
            counts.add(cluster, 200, Use::Data);
        }
        assert_eq!(counts.get(1999), 400);
        counts.add(3, u32::MAX, Use::Data);
        assert_eq!(counts.get(3), u64::from(u32::MAX));
        assert_eq!(counts.get(4), 400);
    }

    proptest! {
        #[test]
        fn pages_say_what_a_map_says(adds in prop::collection::vec((0u64..3 * PAGE, 1u32..300), 1..4000)) {
            let mut counts = Counts::default();
            let mut map = BTreeMap::<u64, u64>::new();
            for (cluster, times) in adds {
                counts.add(cluster, times, Use::Data);
                *map.entry(cluster).or_default() += u64::from(times);
            }
            prop_assert!(map.iter().all(|(cluster, count)| counts.get(*cluster) == *count));
            let all: Vec<u64> = counts.referenced(0..3 * PAGE).collect();
            prop_assert_eq!(all, map.keys().copied().collect::<Vec<_>>());
            let some: Vec<u64> = counts.referenced(PAGE / 2..PAGE + 7).collect();
            prop_assert_eq!(some, map.range(PAGE / 2..PAGE + 7).map(|(c, _)| *c).collect::<Vec<_>>());
        }
    }
}
