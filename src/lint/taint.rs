//! How far a value can differ between invocations, and why.

use naga::Span;
use std::rc::Rc;

/// Who may see a value of their own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Level {
    /// Nobody: the whole workgroup sees one value.
    #[default]
    Uniform,
    /// Each subgroup.
    Subgroup,
    /// Each invocation.
    Invocation,
}

/// One link of an explanation: what differs, where, and because of what.
#[derive(Debug)]
pub(super) struct Why {
    pub span: Span,
    pub text: String,
    pub cause: Option<Rc<Why>>,
}

/// A level with its explanation, which a uniform value needs not.
#[derive(Clone, Debug, Default)]
pub(super) struct Taint {
    pub level: Level,
    pub why: Option<Rc<Why>>,
}

impl Taint {
    /// Where a difference begins.
    pub fn source(level: Level, span: Span, text: String) -> Self {
        Self { level, why: Some(Rc::new(Why { span, text, cause: None })) }
    }

    /// The wider of the two; of equals the first, so that explanations do not change while a loop is repeated.
    pub fn join(self, other: Self) -> Self {
        if other.level > self.level { other } else { self }
    }

    /// The same level, explained by one more link. A uniform value stays unexplained.
    pub fn because(self, span: Span, text: impl FnOnce() -> String) -> Self {
        if self.level == Level::Uniform {
            return self;
        }
        Self { level: self.level, why: Some(Rc::new(Why { span, text: text(), cause: self.why })) }
    }
}
