//! Those who change images in turn.

use anyhow::Result;

use super::layout::Preallocation;
use super::program::Program;
use super::world::{Image, Op, Outcome, World};

/// What is done with a snapshot of the top.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "they are what they are called")]
pub enum SnapshotVerb {
    Create,
    Apply,
    Delete,
}

impl SnapshotVerb {
    /// As in a sentence.
    pub fn name(self) -> &'static str {
        match self {
            SnapshotVerb::Create => "create",
            SnapshotVerb::Apply => "apply",
            SnapshotVerb::Delete => "delete",
        }
    }
}

/// Somebody who can change the images of a world. Each method leaves the image closed.
///
/// An error is a finding: something broke that must not. What may be refused is an [`Outcome`].
pub trait Hand {
    /// Who it is.
    fn name(&self) -> &'static str;

    /// If it is a program, which can do more.
    fn program(&self) -> Option<&Program> {
        None
    }

    /// Makes `image`, which is to lie above the world's top if `backing`, of that size in bytes.
    fn create(&mut self, world: &mut World, image: &Image, backing: bool) -> Result<Outcome>;

    /// Carries requests out on the top, wave by wave; those of a wave touch different bytes and may go at once.
    fn batch(&mut self, world: &mut World, waves: &[Vec<Op>]) -> Result<Vec<Outcome>>;

    /// Something with a snapshot of the top.
    fn snapshot(&mut self, world: &mut World, verb: SnapshotVerb, name: &str) -> Result<Outcome>;

    /// Gives the top another size.
    fn resize(&mut self, world: &mut World, size: u64, preallocation: Preallocation) -> Result<Outcome>;

    /// Looks at an image of the chain, and compares it, and its snapshots, with what it must hold.
    fn verify(&mut self, world: &mut World, index: usize) -> Result<()>;
}
