//! `zbdkit man`: manual pages, made from the same source as `--help`.

use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, Command, CommandFactory};
use clap_mangen::Man as Page;

use crate::cli::Cli;
use crate::output::Out;

/// Write the manual pages
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct Man {
    /// Where to write zbdkit.1, zbdkit-create.1, ... [default: print zbdkit(1)]
    #[arg(value_name = "DIR")]
    pub directory: Option<PathBuf>,
}

const AFTER_HELP: &str = "\
Examples:
  zbdkit man | man -l -
  zbdkit man ~/.local/share/man/man1";

/// On every page but the first, which has its own.
const EXIT_STATUS: &str = "\
Exit status:
  0  it worked
  1  it failed; the reason is on stderr
  2  the command line is wrong";

pub fn run(args: &Man) -> anyhow::Result<()> {
    let pages = pages()?;
    let Some(directory) = &args.directory else {
        let mut out = Out::new();
        out.text(&pages[0].1)?;
        return out.flush();
    };
    std::fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
    for (name, text) in pages {
        let path = directory.join(format!("{name}.1"));
        std::fs::write(&path, text).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// All pages, name and text, that of the whole first.
fn pages() -> anyhow::Result<Vec<(String, String)>> {
    let mut root = Cli::command().disable_help_subcommand(true);
    root.build();
    let mut pages = vec![("zbdkit".to_owned(), page(&root, "zbdkit")?)];
    for verb in root.get_subcommands() {
        let name = format!("zbdkit-{}", verb.get_name());
        let verb = verb.clone().name(name.clone()).display_name(name.clone());
        pages.push((name.clone(), page(&verb, &name)?));
    }
    Ok(pages)
}

fn page(command: &Command, name: &str) -> anyhow::Result<String> {
    let extra = command
        .get_after_help()
        .map(ToString::to_string)
        .unwrap_or_default();
    let page = Page::new(command.clone())
        .title(name.to_uppercase())
        .source("zbdkit")
        .manual("zbdkit");
    let mut text = Vec::new();
    page.render_title(&mut text)?;
    page.render_name_section(&mut text)?;
    page.render_synopsis_section(&mut text)?;
    page.render_description_section(&mut text)?;
    page.render_options_section(&mut text)?;
    if command.has_subcommands() {
        page.render_subcommands_section(&mut text)?;
    }
    // Each part brings the same preamble; one is enough.
    let preamble = ".ie \\n(.g .ds Aq \\(aq\n.el .ds Aq '\n";
    let text = String::from_utf8(text)?.replace(preamble, "");
    let mut text = format!("{preamble}{text}");
    sections(&mut text, &extra);
    if !extra.contains("Exit status:") {
        sections(&mut text, EXIT_STATUS);
    }
    if name != "zbdkit" {
        text.push_str(".SH \"SEE ALSO\"\n\\fBzbdkit\\fR(1)\n");
    }
    Ok(text)
}

/// The text behind the options of `--help`: `Title:` lines become sections, what is indented stays as it is.
fn sections(page: &mut String, text: &str) {
    let mut as_is = false;
    for line in text.lines() {
        let indented = line.starts_with(' ');
        if indented != as_is {
            page.push_str(if indented { ".PP\n.nf\n" } else { ".fi\n" });
            as_is = indented;
        }
        match line.strip_suffix(':').filter(|_| !indented) {
            Some(title) => page.push_str(&format!(".SH \"{}\"\n", title.to_uppercase())),
            None if line.is_empty() => page.push_str(".PP\n"),
            None => {
                page.push_str(&escaped(line.strip_prefix("  ").unwrap_or(line)));
                page.push('\n');
            }
        }
    }
    if as_is {
        page.push_str(".fi\n");
    }
}

fn escaped(line: &str) -> String {
    let line = line.replace('\\', "\\e").replace('-', "\\-");
    // A line that begins with a control character is a request.
    if line.starts_with(['.', '\'']) {
        format!("\\&{line}")
    } else {
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_verb_has_a_page_with_an_example_of_itself() {
        let pages = pages().unwrap();
        let verbs = Cli::command().get_subcommands().count();
        assert_eq!(pages.len(), verbs + 1);
        for (name, text) in &pages {
            assert!(text.contains(".SH \"EXAMPLES\""), "{name}: {text}");
            assert!(text.contains(".SH \"EXIT STATUS\""), "{name}");
            let example = escaped(&name.replacen('-', " ", 1));
            let examples = text.split(".SH \"EXAMPLES\"").nth(1).unwrap();
            assert!(examples.contains(&example), "{name} shows no {example:?}");
        }
    }

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }
}
