//! The same commands to zbdkit's controller and to QEMU's, answer by answer. Where they differ is written down in
//! `docs/nvme-differences.md`, with the reason; a difference that is not there fails, and so does one that is gone.

use anyhow::{Context, Result, ensure};

use super::{Stage, Zones, plain_raw, qemu};
use crate::ui::say;

const SCRIPT: &str = include_str!("../../guest/nvme-verbs.sh");
const KNOWN: &str = include_str!("../../../docs/nvme-differences.md");

const ZONES: Zones = Zones {
    count: 16,
    size: 4,
    capacity: 3,
    max_open: 4,
    max_active: 6,
    extras: true,
};

/// There are more commands in a whole transcript.
const FEWEST: usize = 180;

pub(super) fn play(stage: &Stage<'_>) -> Result<()> {
    let (zones, plain) = (stage.image("zones.raw"), stage.image("plain.raw"));
    ZONES.create(stage.zbdkit, &zones)?;
    for name in ["plain.raw", "qemu-plain.raw"] {
        std::fs::File::create_new(stage.image(name))?.set_len(16 << 20)?;
    }
    let share = stage.image("share");
    std::fs::create_dir(&share)?;
    let namespaces = [zones, plain_raw(&plain)];
    let daemon = stage.serve(&namespaces)?;
    let mut guest = ZONES.describe(stage.guest("guest", SCRIPT, &daemon));
    guest.share = Some(share.clone());
    guest
        .qemu_args
        .extend(qemu::arguments(&stage.image("qemu.raw"), &ZONES)?);
    guest
        .qemu_args
        .extend(qemu::plain_namespace(&stage.image("qemu-plain.raw")));
    guest.run()?.check()?;
    daemon.kill()?;
    // The last thing was a format to another block size, and writes after it.
    let daemon = stage.serve(&namespaces)?;
    let mut guest = ZONES.describe(stage.guest("formatted", SCRIPT, &daemon));
    guest.share = Some(share.clone());
    guest.variable("PART", "formatted").run()?.check()?;
    daemon.stop()?;

    let read = |name: &str| {
        let path = share.join(name);
        std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    let (ours, theirs) = (steps(&read("zbdkit")?), steps(&read("qemu")?));
    ensure!(
        ours.len() > FEWEST,
        "only {} commands; see {}",
        ours.len(),
        share.display()
    );
    let found = differences(&theirs, &ours)?;
    let known = known(KNOWN);
    let (new, gone) = compare(&found, &known);
    say(&format!(
        "{} commands, {} of them answered differently",
        ours.len(),
        found.len()
    ));
    ensure!(
        new.is_empty() && gone.is_empty(),
        "differences that docs/nvme-differences.md does not have:\n{}\nthat it has, and are gone:\n{}\nboth transcripts are in {}",
        new.join("\n"),
        gone.join("\n"),
        share.display()
    );
    Ok(())
}

/// A command and the lines of its answer.
type Step = (String, Vec<String>);

/// Reads a transcript: `$ COMMAND`, and what it says. A command that comes again is numbered.
fn steps(transcript: &str) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    for line in transcript.lines() {
        if let Some(command) = line.strip_prefix("$ ") {
            let numbered = |number: usize| match number {
                1 => command.to_owned(),
                _ => format!("{command} ({number})"),
            };
            let number = (1..)
                .find(|number| steps.iter().all(|(other, _)| *other != numbered(*number)))
                .unwrap_or(1);
            steps.push((numbered(number), Vec::new()));
        } else if let Some((_, said)) = steps.last_mut()
            && !line.starts_with("## ")
        {
            said.push(line.to_owned());
        }
    }
    steps
}

/// The blocks `$ COMMAND`, `-theirs`, `+ours` for each command that is answered differently.
///
/// # Errors
/// When the commands themselves differ.
fn differences(theirs: &[Step], ours: &[Step]) -> Result<Vec<String>> {
    let commands =
        |steps: &[Step]| -> Vec<String> { steps.iter().map(|(command, _)| command.clone()).collect() };
    ensure!(
        commands(theirs) == commands(ours),
        "the drives were not given the same commands:\n{}",
        changes(&commands(theirs), &commands(ours)).join("\n")
    );
    let changed = |((command, theirs), (_, ours)): (&Step, &Step)| {
        let lines = changes(theirs, ours);
        (!lines.is_empty()).then(|| format!("$ {command}\n{}", lines.join("\n")))
    };
    Ok(theirs.iter().zip(ours).filter_map(changed).collect())
}

/// What turns `old` into `new`: `-` and `+` lines, by a longest common subsequence.
fn changes(old: &[String], new: &[String]) -> Vec<String> {
    // common[i][j]: how many lines old[i..] and new[j..] have in common.
    let mut common = vec![vec![0_u32; new.len() + 1]; old.len() + 1];
    for i in (0..old.len()).rev() {
        for j in (0..new.len()).rev() {
            common[i][j] = if old[i] == new[j] {
                common[i + 1][j + 1] + 1
            } else {
                common[i + 1][j].max(common[i][j + 1])
            };
        }
    }
    let (mut i, mut j) = (0, 0);
    let mut lines = Vec::new();
    while i < old.len() || j < new.len() {
        if i < old.len() && j < new.len() && old[i] == new[j] {
            (i, j) = (i + 1, j + 1);
        } else if i < old.len() && (j == new.len() || common[i + 1][j] >= common[i][j + 1]) {
            lines.push(format!("-{}", old[i]));
            i += 1;
        } else {
            lines.push(format!("+{}", new[j]));
            j += 1;
        }
    }
    lines
}

/// The blocks in the `diff` fences of a page, where one fence may have several.
fn known(page: &str) -> Vec<String> {
    let mut blocks: Vec<String> = Vec::new();
    let mut inside = false;
    for line in page.lines() {
        if line.starts_with("```") {
            inside = line == "```diff";
        } else if inside && line.starts_with("$ ") {
            blocks.push(line.to_owned());
        } else if inside && let Some(block) = blocks.last_mut() {
            *block += &format!("\n{line}");
        }
    }
    blocks
}

/// What is only in `found`, and what is only in `known`.
fn compare<'a>(found: &'a [String], known: &'a [String]) -> (Vec<&'a str>, Vec<&'a str>) {
    let only = |these: &'a [String], others: &[String]| -> Vec<&'a str> {
        let missing = these.iter().filter(|block| !others.contains(block));
        missing.map(String::as_str).collect()
    };
    (only(found, known), only(known, found))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transcript_is_read_command_by_command_and_repeated_ones_are_told_apart() {
        let read = steps("## part\n$ a\nx\ny\n$ b\n## part\n$ a\nz\n");
        let names: Vec<&str> = read.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["a", "b", "a (2)"]);
        assert_eq!(read[0].1, ["x", "y"]);
        assert_eq!(read[2].1, ["z"]);
    }

    #[test]
    fn only_what_differs_is_shown_and_other_commands_are_an_error() {
        let theirs = steps("$ a\nsame\nold\n$ b\nx\n");
        let ours = steps("$ a\nsame\nnew\nmore\n$ b\nx\n");
        assert_eq!(differences(&theirs, &ours).unwrap(), ["$ a\n-old\n+new\n+more"]);
        assert!(differences(&theirs, &steps("$ a\n")).is_err());
    }

    #[test]
    fn a_new_difference_and_one_that_is_gone_are_found() {
        let page = "# Title\n$ no\n```diff\n$ a\n-old\n+new\n$ b\n-1\n```\ntext\n```text\n$ c\n```\n";
        let known = known(page);
        assert_eq!(known, ["$ a\n-old\n+new", "$ b\n-1"]);
        let found = ["$ a\n-old\n+newer".to_owned(), "$ b\n-1".to_owned()];
        assert_eq!(
            compare(&found, &known),
            (vec!["$ a\n-old\n+newer"], vec!["$ a\n-old\n+new"])
        );
        assert_eq!(compare(&found[1..], &known[1..]), (vec![], vec![]));
    }
}
