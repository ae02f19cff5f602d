//! Logging to stderr: warnings in the voice of the errors, everything in tracing's own form with `-v` or RUST_LOG.

use std::fmt;

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::{FmtContext, fmt};
use tracing_subscriber::registry::LookupSpan;

use crate::cli::Verb;

/// Starts logging.
pub fn init(verbose: u8, verb: &Verb) {
    let default = match (verbose, verb) {
        // What opening found is part of what `info` prints.
        (0, Verb::Info(_)) => "warn,zbdkit_block=error",
        (0, _) => "warn",
        (1, _) => "info",
        (_, _) => "debug",
    };
    let asked = std::env::var("RUST_LOG").ok().filter(|filter| !filter.is_empty());
    let plain = verbose == 0 && asked.is_none();
    let filter = EnvFilter::new(asked.as_deref().unwrap_or(default));
    let builder = fmt().with_writer(std::io::stderr).with_env_filter(filter);
    if plain {
        builder.event_format(Plain).init();
    } else {
        builder.init();
    }
}

/// `zbdkit: warning: MESSAGE`.
struct Plain;

impl<S, N> FormatEvent<S, N> for Plain
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let level = match *event.metadata().level() {
            Level::ERROR => "error",
            Level::WARN => "warning",
            _ => "note",
        };
        write!(writer, "zbdkit: {level}: ")?;
        context.field_format().format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}
