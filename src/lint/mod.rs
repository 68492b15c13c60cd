//! What naga does not check: that barriers stand in uniform control flow.
//!
//! A barrier that only some invocations of a workgroup reach hangs one GPU and gives wrong numbers on another. Browsers
//! refuse such WGSL; naga, and so native wgpu, takes it. [`lint`] finds it without a GPU, in any WGSL with compute
//! entry points, so that a kernel can be held to the browsers' rule where it is written.
//!
//! The analysis follows local variables, early returns, loops and calls. It takes a value for different between
//! invocations unless it can show otherwise, as WGSL's own rules do: what it accepts is uniform. It draws the line where
//! Tint, the compiler of Chromium's browsers, draws it; the seeded kernels of `tests/uniformity` are held against both.
//!
//! ```
//! let source = "
//! var<workgroup> total: array<u32, 64>;
//! @compute @workgroup_size(64)
//! fn sum(@builtin(local_invocation_index) lane: u32) {
//!     total[lane] = lane;
//!     if lane < 32u { workgroupBarrier(); }
//! }";
//! let findings = wgmoe::lint::lint("sum.wgsl", source)?;
//! assert_eq!(findings[0].line, 6);
//! assert!(findings[0].because.iter().any(|step| step.text.contains("lane < 32u")));
//! # Ok::<(), wgmoe::Error>(())
//! ```

mod flow;
mod taint;

use crate::error::{Error, Result};
use naga::valid::{Capabilities, ShaderStages, SubgroupOperationSet, ValidationFlags, Validator};
use naga::{Module, ShaderStage, Span};
use serde::Serialize;
use std::rc::Rc;
use taint::Why;

/// What was broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Rule {
    /// A barrier, or `workgroupUniformLoad`, that not all invocations of a workgroup reach alike. Never right.
    Barrier,
    /// A subgroup operation that not all invocations of a subgroup reach alike: those that do not take no part, which
    /// differs between drivers.
    Subgroup,
}

impl Rule {
    /// The rule's name.
    pub fn name(self) -> &'static str {
        match self {
            Rule::Barrier => "barrier",
            Rule::Subgroup => "subgroup",
        }
    }
}

/// One place where a rule is broken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Which rule.
    pub rule: Rule,
    /// The entry point from which it is reached.
    pub entry_point: String,
    /// Line of the source, from 1.
    pub line: u32,
    /// Column in bytes, from 1.
    pub column: u32,
    /// What is wrong there.
    pub message: String,
    /// Why, from the control flow at that place to the value in which invocations differ.
    pub because: Vec<Step>,
}

/// One step of an explanation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Step {
    /// Line of the source, from 1.
    pub line: u32,
    /// What is so there.
    pub text: String,
}

/// What the analysis found, with places as naga has them.
struct Violation {
    rule: Rule,
    span: Span,
    message: String,
    why: Option<Rc<Why>>,
}

/// All places in `source` where invocations may not arrive at a barrier, or at a subgroup operation, together.
/// `name` stands in errors: of WGSL that naga refuses.
pub fn lint(name: &str, source: &str) -> Result<Vec<Finding>> {
    let module = parse(source).map_err(|message| Error::Kernel { kernel: name.to_owned(), message })?;
    let mut findings = Vec::new();
    for entry in module.entry_points.iter().filter(|entry| entry.stage == ShaderStage::Compute) {
        for violation in flow::Analysis::of_entry_point(&module, source, entry) {
            findings.push(finding(violation, &entry.name, source));
        }
    }
    Ok(findings)
}

/// Through naga's own checks first: the analysis relies on them.
fn parse(source: &str) -> std::result::Result<Module, String> {
    let source = without_enable_subgroups(source);
    let module = naga::front::wgsl::parse_str(&source).map_err(|error| error.emit_to_string(&source))?;
    Validator::new(ValidationFlags::all(), Capabilities::all())
        .subgroup_stages(ShaderStages::COMPUTE)
        .subgroup_operations(SubgroupOperationSet::all())
        .validate(&module)
        .map_err(|error| error.emit_to_string(&source))?;
    Ok(module)
}

/// Browsers want this line and naga 30 refuses it. Blanks keep every place where it is.
fn without_enable_subgroups(source: &str) -> String {
    let directive = "enable subgroups;";
    source.replacen(directive, &" ".repeat(directive.len()), 1)
}

fn finding(violation: Violation, entry_point: &str, source: &str) -> Finding {
    let place = violation.span.location(source);
    let mut because: Vec<Step> = Vec::new();
    let mut next = violation.why;
    while let Some(why) = next {
        let step = Step { line: why.span.location(source).line_number, text: why.text.clone() };
        if !because.contains(&step) {
            because.push(step);
        }
        next = why.cause.clone();
    }
    Finding {
        rule: violation.rule,
        entry_point: entry_point.to_owned(),
        line: place.line_number,
        column: place.line_position,
        message: violation.message,
        because,
    }
}
