//! The verbs.

pub mod check;
pub mod commit;
pub mod compare;
pub mod completions;
pub mod convert;
pub mod create;
pub mod info;
pub mod io;
pub mod list;
pub mod man;
pub mod map;
pub mod rebase;
pub mod report;
pub mod resize;
pub mod serve;
pub mod set_zone;
pub mod snapshot;
pub mod zones;

use std::process::ExitCode;

use zones::Op;

use crate::cli::Verb;

/// Does what the verb says.
pub fn run(verb: Verb) -> anyhow::Result<ExitCode> {
    match verb {
        Verb::Create(args) => create::run(args),
        Verb::Info(args) => info::run(&args),
        Verb::Check(args) => return check::run(&args),
        Verb::Snapshot(args) => snapshot::run(&args),
        Verb::Resize(args) => resize::run(&args),
        Verb::Convert(args) => convert::run(&args),
        Verb::Compare(args) => return compare::run(&args),
        Verb::Map(args) => map::run(&args),
        Verb::Rebase(args) => rebase::run(&args),
        Verb::Commit(args) => commit::run(&args),
        Verb::Report(args) => report::run(&args),
        Verb::Io(args) => return io::run(&args),
        Verb::List(args) => list::run(&args),
        Verb::Reset(args) => zones::run(Op::Reset, &args),
        Verb::Open(args) => zones::run(Op::Open, &args),
        Verb::Close(args) => zones::run(Op::Close, &args),
        Verb::Finish(args) => zones::run(Op::Finish, &args),
        Verb::SetZone(args) => set_zone::run(&args),
        Verb::Serve(args) => return serve::run(args),
        Verb::Completions(args) => completions::run(&args),
        Verb::Man(args) => man::run(&args),
    }
    .map(|()| ExitCode::SUCCESS)
}
