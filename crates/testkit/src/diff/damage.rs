//! Damage that the comparison must find, or it would find nothing at all.

use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};

use super::world::World;

/// What is done to the top behind everybody's back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Damage {
    /// A byte of its data changes.
    Byte,
    /// A cluster loses its place in the mapping.
    Mapping,
    /// A cluster that is in use is marked free.
    Refcount,
}

impl Damage {
    /// Does it. An image without such a cluster stays whole, and an error says so.
    ///
    /// # Errors
    /// Also of the file system.
    pub fn inflict(self, world: &mut World) -> Result<()> {
        world.trace.push(format!("# damage: {self:?}"));
        let image = world.top();
        ensure!(image.data_file.is_none(), "no data here to damage");
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(world.path(&image.name))?;
        let word = |offset| -> Result<u64> {
            let mut bytes = [0; 8];
            file.read_exact_at(&mut bytes, offset)?;
            Ok(u64::from_be_bytes(bytes))
        };
        const ADDRESS: u64 = 0x00ff_ffff_ffff_fe00;
        let l1 = word(40)?;
        let entries = word(36 - 4)? as u32;
        let l2 = (0..u64::from(entries))
            .map(|index| word(l1 + index * 8))
            .find_map(|entry| entry.ok().map(|entry| entry & ADDRESS).filter(|at| *at != 0))
            .context("no L2 table to damage")?;
        let layout = world.layout();
        let size = if layout.extended_l2 { 16 } else { 8 };
        let own = |entry: u64| entry >> 62 == 2 && entry & ADDRESS != 0 && entry & 1 == 0;
        let (at, entry) = (0..layout.cluster_size / size)
            .map(|index| l2 + index * size)
            .find_map(|at| word(at).ok().filter(|entry| own(*entry)).map(|entry| (at, entry)))
            .context("no data to damage")?;
        match self {
            Damage::Byte => {
                let mut byte = [0];
                file.read_exact_at(&mut byte, (entry & ADDRESS) + 7)?;
                file.write_all_at(&[byte[0] ^ 1], (entry & ADDRESS) + 7)?;
            }
            Damage::Mapping => file.write_all_at(&[0; 16][..size as usize], at)?,
            Damage::Refcount => {
                let table = word(48)?;
                let block = word(table)?;
                let bits = u64::from(layout.refcount_bits);
                let bit = (entry & ADDRESS) / layout.cluster_size * bits;
                let byte = (bits / 8).max(1);
                file.write_all_at(&[0; 8][..byte as usize], block + bit / 8)?;
            }
        }
        Ok(())
    }
}
