//! QEMU's own NVMe drive with a zoned namespace, for comparison: `nvme` and `nvme-ns,zoned=on`.

use std::path::Path;

use anyhow::Result;

use super::Zones;

/// QEMU's arguments for a controller with a zoned namespace, whose data is in `file`, which is made if it is not there.
pub(super) fn arguments(file: &Path, zones: &Zones) -> Result<Vec<String>> {
    if !file.exists() {
        std::fs::File::create_new(file)?.set_len(u64::from(zones.count * zones.size) << 20)?;
    }
    let path = file.display().to_string().replace(',', ",,");
    let extras = if zones.extras {
        ",zoned.descr_ext_size=64,zoned.numzrwa=2,zoned.zrwas=64K,zoned.zrwafg=16K"
    } else {
        ""
    };
    Ok([
        // What one command moves is limited as in zbdkit.
        "-device".to_owned(),
        "nvme,id=qemu,serial=qemu,mdts=8".to_owned(),
        "-drive".to_owned(),
        format!("if=none,id=qemu-zones,format=raw,discard=unmap,file={path}"),
        "-device".to_owned(),
        format!(
            "nvme-ns,bus=qemu,drive=qemu-zones,nsid=1,zoned=on,zoned.zone_size={}M,zoned.zone_capacity={}M,\
             zoned.max_open={},zoned.max_active={},logical_block_size=4096,physical_block_size=4096{extras}",
            zones.size, zones.capacity, zones.max_open, zones.max_active
        ),
    ]
    .into())
}

/// Arguments for a second namespace, of blocks of 512 bytes and without zones, whose data is in `file`.
pub(super) fn plain_namespace(file: &Path) -> [String; 4] {
    let path = file.display().to_string().replace(',', ",,");
    [
        "-drive".to_owned(),
        format!("if=none,id=qemu-plain,format=raw,discard=unmap,file={path}"),
        "-device".to_owned(),
        "nvme-ns,bus=qemu,drive=qemu-plain,nsid=2".to_owned(),
    ]
}
