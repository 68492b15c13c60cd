//! `wgmoe completions` and `wgmoe man`: what shells and `man` know of the command line, made from its own definition.

use crate::output::Output;
use crate::{Cli, Verdict, unusable};
use anyhow::Context as _;
use clap::CommandFactory;
use clap_complete::Shell;
use std::path::PathBuf;

const COMPLETIONS: &str = "\
Examples:
  wgmoe completions bash > ~/.local/share/bash-completion/completions/wgmoe
  wgmoe completions zsh > ~/.zfunc/_wgmoe
  wgmoe completions fish > ~/.config/fish/completions/wgmoe.fish";

/// Print what a shell needs to complete options and their values
#[derive(clap::Args, Debug)]
#[command(after_help = COMPLETIONS)]
pub struct Completions {
    /// The shell
    shell: Shell,
}

const MAN: &str = "\
Examples:
  wgmoe man ~/.local/share/man/man1 && man wgmoe-bench";

/// Write a man page for each subcommand
#[derive(clap::Args, Debug)]
#[command(after_help = MAN)]
pub struct Man {
    /// Folder for the pages; made if it is not there
    folder: PathBuf,
}

pub fn completions(args: &Completions, output: &mut Output) -> Verdict {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "wgmoe", &mut text);
    output.bytes(&text);
    Verdict::Right
}

pub fn man(args: &Man, output: &mut Output) -> anyhow::Result<Verdict> {
    let folder = &args.folder;
    if folder.is_file() {
        return Err(unusable(format!("{}: a file, expected a folder", folder.display())));
    }
    std::fs::create_dir_all(folder).with_context(|| format!("{}: not made", folder.display()))?;
    clap_mangen::generate_to(Cli::command(), folder)
        .with_context(|| format!("{}: pages not written", folder.display()))?;
    output.line(&format!("man pages written to {}", folder.display()));
    Ok(Verdict::Right)
}
