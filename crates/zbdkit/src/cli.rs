//! The command line as clap sees it; man pages and completions are made from the same source.

use clap::{Parser, Subcommand};

use crate::verbs::{
    check, commit, compare, completions, convert, create, info, io, list, man, map, rebase, report, resize,
    serve, set_zone, snapshot, zones,
};

/// Makes zoned block devices and attaches them to virtual machines
///
/// A zoned block device is written as SMR disks and ZNS drives are: it is divided into zones, and each sequential zone is
/// written only at its write pointer. zbdkit keeps such a device in an ordinary file and serves it to virtual
/// machines.
#[derive(Debug, Parser)]
#[command(name = "zbdkit", version, max_term_width = 100, after_help = AFTER_HELP)]
pub struct Cli {
    /// Say more on stderr; twice for debugging (RUST_LOG=... is finer)
    #[arg(short, long, global = true, display_order = 900, action = clap::ArgAction::Count)]
    pub verbose: u8,

    #[command(subcommand)]
    pub verb: Verb,
}

const AFTER_HELP: &str = "\
Examples:
  zbdkit create disk.qcow2 --size 768M --zone-size 64M --max-open 6 --max-active 8
  zbdkit serve disk.qcow2 --vhost-user-blk /tmp/disk.sock
  zbdkit report disk.qcow2
  zbdkit io disk.qcow2 -c 'zrp 0 12' -c 'zap -p 0 0x1000 0x2000'
  zbdkit list; zbdkit check /dev/sdb

Images:
  An IMAGE is a path, a graph as QEMU writes it (driver=zoned,
  file.driver=file,file.filename=disk.raw,sidecar=zones.tbl) or the same as
  JSON (json:{\"driver\": \"zoned\", ...}). A comma in a value is written twice.
  Drivers: file, host_device, memory, qcow2, raw, zoned. A qcow2 image holds
  its zones itself; the zone table of any other file IMAGE is IMAGE.zones. A
  zoned drive of this machine is named by its device file ('zbdkit list').

Units:
  Sizes and offsets are bytes, with a suffix k, M, G, T, P or E (powers of
  1024), s for 512-byte sectors, or in hex: 64M, 0x4000000 and 0x20000s are
  the same. Zones are counted from 0.

Exit status:
  0  it worked
  1  it failed; the reason is on stderr
  2  the command line is wrong
  'check' and 'compare' have their own, as in qemu-img

Environment:
  RUST_LOG   what to log to stderr, as in RUST_LOG=zbdkit_block=debug
  ZBDKIT_IO  uring or threads: how I/O is done (default: io_uring where the system allows it)";

#[derive(Debug, Subcommand)]
pub enum Verb {
    Create(create::Create),
    Info(info::Info),
    Check(check::Check),
    Snapshot(snapshot::SnapshotArgs),
    Resize(resize::Resize),
    Convert(convert::Convert),
    Compare(compare::Compare),
    Map(map::Map),
    Rebase(rebase::Rebase),
    Commit(commit::Commit),
    Report(report::Report),
    Io(io::Io),
    /// Reset zones: they are empty again
    #[command(after_help = zones::RESET_HELP)]
    Reset(zones::Zones),
    /// Open zones explicitly
    #[command(after_help = zones::OPEN_HELP)]
    Open(zones::Zones),
    /// Close open zones
    #[command(after_help = zones::CLOSE_HELP)]
    Close(zones::Zones),
    /// Finish zones: they are full, whatever was written
    #[command(after_help = zones::FINISH_HELP)]
    Finish(zones::Zones),
    SetZone(set_zone::SetZone),
    List(list::List),
    Serve(serve::Serve),
    Completions(completions::Completions),
    Man(man::Man),
}
