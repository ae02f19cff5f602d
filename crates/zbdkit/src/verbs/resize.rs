//! `zbdkit resize`: changes the size of an image.

use anyhow::{Context, bail};
use clap::Args;
use zbdkit_qcow2::Preallocation;

use crate::args;
use crate::image::{ImageArgs, Session, changing};
use crate::output::{Out, complain};

/// Change the size of an image; a zoned image grows by whole zones
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct Resize {
    #[command(flatten)]
    pub image: ImageArgs,

    /// The new size in bytes, or by how much to grow (+SIZE) or shrink (-SIZE)
    #[arg(value_name = "[+-]SIZE", value_parser = SizeArg::parse, allow_hyphen_values = true)]
    pub size: SizeArg,

    /// Take the image for this format instead of finding out
    #[arg(short, long, value_name = "FORMAT")]
    pub format: Option<String>,

    /// Allow that the image gets smaller: what lies behind its new end is lost
    #[arg(long)]
    pub shrink: bool,

    /// What of the new part gets its space at once: off, metadata, falloc or full
    #[arg(long, value_name = "MODE", value_parser = args::preallocation, default_value = "off")]
    pub preallocation: Preallocation,

    /// Print nothing but errors
    #[arg(short, long)]
    pub quiet: bool,
}

const AFTER_HELP: &str = "\
Examples:
  zbdkit resize disk.qcow2 2G
  zbdkit resize disk.qcow2 +512M
  zbdkit resize --shrink plain.qcow2 1G
  zbdkit resize --shrink plain.qcow2 -256M

Only qcow2 images change their size. One with zones grows by whole zones, which are empty, and shrinks by empty ones; a \
short last zone stays the last or becomes a whole one. Nobody else may have the image open. A guest sees the new size \
when it is started again.";

pub fn run(args: &Resize) -> anyhow::Result<()> {
    let graph = args.image.graph_as(args.format.as_deref())?;
    let session = Session::new()?;
    session.with(&graph, &changing(), async |device| {
        if device.qcow2().is_none() {
            bail!("only qcow2 images change their size; 'zbdkit convert -O qcow2' makes one of this image");
        }
        let old = device.limits().size;
        let new = args.size.applied(old).context("New image size must be positive")?;
        if new < old && !args.shrink {
            complain(
                "warning: Shrinking an image will delete all data beyond the shrunken image's end. Before performing \
                 such an operation, make sure there is no important data there.",
            );
            bail!("Use the --shrink option to perform a shrink operation.");
        }
        if new <= old && args.preallocation != Preallocation::Off {
            bail!("Preallocation can only be used for growing images");
        }
        device.resize(new, args.shrink, args.preallocation).await?;
        Ok(())
    })?;
    let mut out = Out::new();
    if !args.quiet {
        out.line("Image resized.")?;
    }
    out.flush()
}

/// A size, or a change of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SizeArg {
    To(u64),
    More(u64),
    Less(u64),
}

impl SizeArg {
    fn parse(text: &str) -> Result<SizeArg, String> {
        let bytes = |text: &str| args::bytes(text);
        match (text.strip_prefix('+'), text.strip_prefix('-')) {
            (Some(more), _) => bytes(more).map(SizeArg::More),
            (_, Some(less)) => bytes(less).map(SizeArg::Less),
            (None, None) => bytes(text).map(SizeArg::To),
        }
    }

    /// The new size of something that has `size` bytes, which must stay above 0 and within what files can have.
    fn applied(self, size: u64) -> Option<u64> {
        let new = match self {
            SizeArg::To(new) => Some(new),
            SizeArg::More(more) => size.checked_add(more),
            SizeArg::Less(less) => size.checked_sub(less),
        };
        new.filter(|new| (1..=i64::MAX as u64).contains(new))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_absolute_or_changes() {
        let applied = |text: &str| SizeArg::parse(text).unwrap().applied(1 << 30);
        assert_eq!(applied("2G"), Some(2 << 30));
        assert_eq!(applied("+512M"), Some(3 << 29));
        assert_eq!(applied("-512M"), Some(1 << 29));
        assert_eq!(applied("-1G"), None, "nothing would be left");
        assert_eq!(applied("-2G"), None);
        assert_eq!(applied("0"), None);
        assert_eq!(applied("8E"), None);
        assert_eq!(applied("+8E"), None);
        for text in ["", "+", "-", "--5", "+-5", "foo", "1Q"] {
            assert!(SizeArg::parse(text).is_err(), "{text}");
        }
    }
}
