//! The analysis: a walk over naga's statements with the levels of variables and of control flow.
//!
//! ```text
//! control    uniform where all invocations of the workgroup arrive together
//! if c       both branches: control joined with c; afterwards as before, unless a branch can jump away
//! loop       repeated until nothing changes; afterwards as before, unless it can return
//! x = v      x becomes v joined with control: who did not arrive has another value
//! f(a)       walked with the levels of its arguments and of the place that calls it
//! ```
//!
//! What the analysis does not know it takes for different in each invocation, so that it can refuse too much and never
//! too little.

use super::taint::{Level, Taint};
use super::{Rule, Violation};
use naga::{
    AddressSpace, Barrier, Binding, Block, BuiltIn, EntryPoint, Expression, Function, GatherMode, Handle, Module, Span,
    Statement, StorageAccess, SwitchCase, TypeInner,
};
use std::collections::{BTreeMap, HashMap};

/// Where a statement list can end, and the first place of each kind of jump.
#[derive(Clone, Copy, Default)]
struct Ends {
    /// It can run through to what follows.
    next: bool,
    breaks: Option<Span>,
    continues: Option<Span>,
    returns: Option<Span>,
}

impl Ends {
    const NEXT: Self = Self { next: true, breaks: None, continues: None, returns: None };

    /// A jump out of the list, with the word for it.
    fn jump(&self) -> Option<(Span, &'static str)> {
        let words = [(self.breaks, "break"), (self.continues, "continue"), (self.returns, "return")];
        words.into_iter().find_map(|(span, word)| Some((span?, word)))
    }

    /// Ends of either.
    fn or(self, other: Self) -> Self {
        Self {
            next: self.next || other.next,
            breaks: self.breaks.or(other.breaks),
            continues: self.continues.or(other.continues),
            returns: self.returns.or(other.returns),
        }
    }
}

/// What is known at a place of a function.
#[derive(Clone)]
struct State {
    /// By local variable, then by argument for what pointer arguments point to.
    variables: Vec<Taint>,
    control: Taint,
}

impl State {
    fn join(self, other: Self) -> Self {
        let pairs = self.variables.into_iter().zip(other.variables);
        Self { variables: pairs.map(|(a, b)| a.join(b)).collect(), control: self.control.join(other.control) }
    }

    fn levels(&self) -> Vec<Level> {
        self.variables.iter().chain([&self.control]).map(|taint| taint.level).collect()
    }
}

/// `state` joined to what is there, if anything is.
fn join_into(target: &mut Option<State>, state: State) {
    *target = Some(match target.take() {
        Some(there) => there.join(state),
        None => state,
    });
}

/// A loop or switch around the current statement: what its jumps bring along.
#[derive(Default)]
struct Target {
    is_loop: bool,
    breaks: Option<State>,
    continues: Option<State>,
}

/// An argument as the caller sees it.
#[derive(Clone, Default)]
struct Argument {
    /// The value, or for a pointer its index expressions.
    value: Taint,
    /// What a pointer points to.
    content: Taint,
}

/// What a call brings back.
#[derive(Clone)]
struct Outcome {
    value: Taint,
    /// By argument, what it points to afterwards.
    contents: Vec<Taint>,
}

/// All that a call's outcome depends on.
type CallKey = (Handle<Function>, Vec<(Level, Level)>, Level);

/// The analysis of one entry point.
pub(super) struct Analysis<'a> {
    module: &'a Module,
    source: &'a str,
    calls: HashMap<CallKey, Outcome>,
    /// By place, so that a loop's second walk finds nothing twice.
    violations: BTreeMap<(usize, Rule), Violation>,
}

impl<'a> Analysis<'a> {
    pub fn of_entry_point(module: &'a Module, source: &'a str, entry: &'a EntryPoint) -> Vec<Violation> {
        let mut analysis = Self { module, source, calls: HashMap::new(), violations: BTreeMap::new() };
        let arguments = entry.function.arguments.iter().enumerate().map(|(index, argument)| {
            let span = argument_span(&entry.function, index as u32);
            let mut value = bound(argument.binding.as_ref(), span);
            // Of a struct of builtins each member differs as soon as one does: browsers see no parts of it either.
            if let TypeInner::Struct { members, .. } = &module.types[argument.ty].inner {
                let members = members.iter().map(|member| bound(member.binding.as_ref(), span));
                value = members.fold(value, Taint::join);
            }
            Argument { value, ..Argument::default() }
        });
        Walk::run(&mut analysis, &entry.function, arguments.collect(), Taint::default());
        analysis.violations.into_values().collect()
    }

    /// The text at `span`, on one line and not too long.
    fn text(&self, span: Span) -> String {
        let range = span.to_range().unwrap_or_default();
        let text: Vec<&str> = self.source.get(range).unwrap_or_default().split_whitespace().collect();
        let text = text.join(" ");
        match text.char_indices().nth(60) {
            Some((end, _)) => format!("{}...", &text[..end]),
            None => text,
        }
    }

    /// What memory of `space` can hold for two invocations that read the same place.
    fn memory(&self, space: AddressSpace, name: &str, span: Span) -> Taint {
        let source = |text| Taint::source(Level::Invocation, span, text);
        match space {
            AddressSpace::Uniform | AddressSpace::Immediate | AddressSpace::Handle => Taint::default(),
            AddressSpace::Storage { access } if !access.contains(StorageAccess::STORE) => Taint::default(),
            AddressSpace::Storage { .. } => {
                source(format!("`{name}` is a storage buffer that is written: a read may differ between invocations"))
            }
            AddressSpace::WorkGroup => {
                source(format!("`{name}` is workgroup memory: only workgroupUniformLoad reads one value for all"))
            }
            _ => source(format!("`{name}` belongs to each invocation")),
        }
    }
}

impl Rule {
    /// How far those who arrive may differ.
    fn allowed(self) -> Level {
        match self {
            Rule::Barrier => Level::Uniform,
            Rule::Subgroup => Level::Subgroup,
        }
    }

    /// Whose invocations have to arrive together.
    fn group(self) -> &'static str {
        match self {
            Rule::Barrier => "workgroup",
            Rule::Subgroup => "subgroup",
        }
    }
}

/// What an entry point gets from outside.
fn bound(binding: Option<&Binding>, span: Span) -> Taint {
    let (level, name) = match binding {
        None => return Taint::default(),
        Some(Binding::BuiltIn(builtin)) => builtin_level(*builtin),
        Some(_) => (Level::Invocation, "an input"),
    };
    if level == Level::Uniform {
        return Taint::default();
    }
    let whose = if level == Level::Subgroup { "subgroups" } else { "invocations" };
    Taint::source(level, span, format!("{name} differs between {whose}"))
}

fn builtin_level(builtin: BuiltIn) -> (Level, &'static str) {
    match builtin {
        BuiltIn::WorkGroupId => (Level::Uniform, "workgroup_id"),
        BuiltIn::NumWorkGroups => (Level::Uniform, "num_workgroups"),
        BuiltIn::WorkGroupSize => (Level::Uniform, "workgroup_size"),
        BuiltIn::NumSubgroups => (Level::Uniform, "num_subgroups"),
        BuiltIn::SubgroupSize => (Level::Uniform, "subgroup_size"),
        BuiltIn::SubgroupId => (Level::Subgroup, "subgroup_id"),
        BuiltIn::SubgroupInvocationId => (Level::Invocation, "subgroup_invocation_id"),
        BuiltIn::GlobalInvocationId => (Level::Invocation, "global_invocation_id"),
        BuiltIn::LocalInvocationId => (Level::Invocation, "local_invocation_id"),
        BuiltIn::LocalInvocationIndex => (Level::Invocation, "local_invocation_index"),
        _ => (Level::Invocation, "a builtin"),
    }
}

fn argument_span(function: &Function, index: u32) -> Span {
    let is_it = |expression: &Expression| matches!(expression, Expression::FunctionArgument(i) if *i == index);
    let found = function.expressions.iter().find(|(_, expression)| is_it(expression));
    found.map_or(Span::UNDEFINED, |(handle, _)| function.expressions.get_span(handle))
}

/// What a pointer leads to.
enum Root {
    /// An entry of [`State::variables`], and whether the pointer covers all of it.
    Variable {
        index: usize,
        whole: bool,
    },
    Global(Handle<naga::GlobalVariable>),
    /// Something that the analysis does not follow.
    Unknown,
}

/// The walk over one function at one call.
struct Walk<'a, 'b> {
    analysis: &'b mut Analysis<'a>,
    function: &'a Function,
    arguments: Vec<Argument>,
    /// Of expressions that were emitted.
    values: HashMap<Handle<Expression>, Taint>,
    state: State,
    targets: Vec<Target>,
    /// States and values at returns.
    returned: Option<(State, Taint)>,
}

impl<'a, 'b> Walk<'a, 'b> {
    fn run(
        analysis: &'b mut Analysis<'a>,
        function: &'a Function,
        arguments: Vec<Argument>,
        control: Taint,
    ) -> Outcome {
        let mut variables = vec![Taint::default(); function.local_variables.len()];
        variables.extend(arguments.iter().map(|argument| argument.content.clone()));
        let state = State { variables, control };
        let num_arguments = arguments.len();
        let mut walk =
            Self { analysis, function, arguments, values: HashMap::new(), state, targets: Vec::new(), returned: None };
        if walk.block(&function.body).next {
            walk.leave(Taint::default());
        }
        let (state, value) = walk.returned.unwrap_or((walk.state, Taint::default()));
        let contents = state.variables[state.variables.len() - num_arguments..].to_vec();
        Outcome { value, contents }
    }

    /// A return with `value`, which only those have who arrive here.
    fn leave(&mut self, value: Taint) {
        let value = value.join(self.state.control.clone());
        let state = self.state.clone();
        self.returned = Some(match self.returned.take() {
            Some((there, other)) => (there.join(state), other.join(value)),
            None => (state, value),
        });
    }

    // --- statements

    fn block(&mut self, block: &'a Block) -> Ends {
        let mut ends = Ends::NEXT;
        for (statement, span) in block.span_iter() {
            let these = self.statement(statement, *span);
            ends = Ends { next: these.next, ..ends.or(these) };
        }
        ends
    }

    fn statement(&mut self, statement: &'a Statement, span: Span) -> Ends {
        match statement {
            Statement::Emit(range) => {
                for handle in range.clone() {
                    let taint = self.evaluate(handle);
                    self.values.insert(handle, taint);
                }
            }
            Statement::Block(block) => return self.block(block),
            Statement::If { condition, accept, reject } => return self.branches(*condition, &[accept, reject]),
            Statement::Switch { selector, cases } => return self.switch(*selector, cases),
            Statement::Loop { body, continuing, break_if } => return self.repeat(body, continuing, *break_if),
            Statement::Break => {
                if let Some(target) = self.targets.last_mut() {
                    join_into(&mut target.breaks, self.state.clone());
                }
                return Ends { breaks: Some(span), ..Ends::default() };
            }
            Statement::Continue => {
                if let Some(target) = self.targets.iter_mut().rev().find(|target| target.is_loop) {
                    join_into(&mut target.continues, self.state.clone());
                }
                return Ends { continues: Some(span), ..Ends::default() };
            }
            Statement::Return { value } => {
                let value = value.map(|value| self.taint(value)).unwrap_or_default();
                self.leave(value);
                return Ends { returns: Some(span), ..Ends::default() };
            }
            Statement::Kill => return Ends { returns: Some(span), ..Ends::default() },
            Statement::ControlBarrier(flags) => self.barrier(*flags, span),
            Statement::Store { pointer, value } => self.store(*pointer, *value, span),
            Statement::WorkGroupUniformLoad { pointer, result } => {
                self.require(Rule::Barrier, span, "workgroupUniformLoad");
                self.require_uniform(Rule::Barrier, *pointer, span, "the place that workgroupUniformLoad reads");
                self.values.insert(*result, Taint::default());
            }
            Statement::Call { function, arguments, result } => self.call(*function, arguments, *result, span),
            Statement::Atomic { result: Some(result), .. } => {
                let text = "each invocation gets a result of its own from an atomic operation".to_owned();
                self.values.insert(*result, Taint::source(Level::Invocation, span, text));
            }
            Statement::SubgroupBallot { result, .. } | Statement::SubgroupCollectiveOperation { result, .. } => {
                self.subgroup(*result, span);
            }
            Statement::SubgroupGather { mode, result, .. } => {
                if let GatherMode::ShuffleDown(by) | GatherMode::ShuffleUp(by) | GatherMode::ShuffleXor(by) = mode {
                    self.require_uniform(Rule::Subgroup, *by, span, "the distance of a shuffle");
                }
                self.subgroup(*result, span);
            }
            // The others neither jump nor give values that the analysis would take for uniform.
            _ => {}
        }
        Ends::NEXT
    }

    /// A condition and what it chooses between.
    fn branches(&mut self, condition: Handle<Expression>, blocks: &[&'a Block]) -> Ends {
        let before = self.state.clone();
        let inside = self.divided(condition);
        let mut after: Option<State> = None;
        let mut ends = Ends::default();
        for block in blocks {
            self.state = State { control: inside.clone(), ..before.clone() };
            let these = self.block(block);
            if these.next {
                join_into(&mut after, self.state.clone());
            }
            ends = ends.or(these);
        }
        self.meet(before, after, ends.jump());
        ends
    }

    /// Control flow inside of something that `condition` chooses.
    fn divided(&self, condition: Handle<Expression>) -> Taint {
        let span = self.function.expressions.get_span(condition);
        let differs = self.taint(condition).because(span, || {
            format!("the condition `{}` is not the same for all invocations", self.analysis.text(span))
        });
        self.state.control.clone().join(differs)
    }

    /// After a branch: together again, unless some may have jumped away.
    fn meet(&mut self, before: State, after: Option<State>, jump: Option<(Span, &str)>) {
        // Nobody comes here; what is known of the variables does not matter.
        let Some(after) = after else { return };
        let control = match jump {
            None => before.control,
            Some((span, word)) if after.control.level > before.control.level => {
                after.control.because(span, || format!("some invocations may have left by this `{word}`"))
            }
            Some(_) => after.control,
        };
        self.state = State { control, ..after };
    }

    fn switch(&mut self, selector: Handle<Expression>, cases: &'a [SwitchCase]) -> Ends {
        let before = self.state.clone();
        let inside = self.divided(selector);
        self.targets.push(Target::default());
        let mut ends = Ends::default();
        let mut through: Option<State> = None;
        for case in cases {
            self.state = State { control: inside.clone(), ..before.clone() };
            if let Some(through) = through.take() {
                self.state = self.state.clone().join(through);
            }
            let these = self.block(&case.body);
            if these.next {
                if case.fall_through {
                    through = Some(self.state.clone());
                } else if let Some(target) = self.targets.last_mut() {
                    join_into(&mut target.breaks, self.state.clone());
                }
            }
            ends = ends.or(these);
        }
        let after = self.targets.pop().and_then(|target| target.breaks);
        let ends = Ends { next: after.is_some(), breaks: None, ..ends };
        self.meet(before, after, ends.jump());
        ends
    }

    fn repeat(&mut self, body: &'a Block, continuing: &'a Block, break_if: Option<Handle<Expression>>) -> Ends {
        let before = self.state.clone();
        let mut head = before.clone();
        loop {
            self.state = head.clone();
            let (ends, breaks) = self.once(body, continuing, break_if);
            let next = match &ends {
                Ends { next: true, .. } => head.clone().join(self.state.clone()),
                _ => head.clone(),
            };
            if next.levels() != head.levels() {
                head = next;
                continue;
            }
            let returns = ends.returns;
            let ends = Ends { next: breaks.is_some(), breaks: None, continues: None, returns };
            self.meet(before, breaks, ends.jump());
            return ends;
        }
    }

    /// One round of a loop: whether there can be another, with which state, and the state of those who left it.
    fn once(
        &mut self,
        body: &'a Block,
        continuing: &'a Block,
        break_if: Option<Handle<Expression>>,
    ) -> (Ends, Option<State>) {
        self.targets.push(Target { is_loop: true, ..Target::default() });
        let mut ends = self.block(body);
        let mut arrive = self.targets.last_mut().and_then(|target| target.continues.take());
        if ends.next {
            join_into(&mut arrive, self.state.clone());
        }
        ends.next = arrive.is_some();
        if let Some(arrive) = arrive {
            self.state = arrive;
            ends = ends.or(self.block(continuing));
            if let Some(condition) = break_if {
                self.state.control = self.divided(condition);
                if let Some(target) = self.targets.last_mut() {
                    join_into(&mut target.breaks, self.state.clone());
                }
            }
        }
        (ends, self.targets.pop().and_then(|target| target.breaks))
    }

    fn store(&mut self, pointer: Handle<Expression>, value: Handle<Expression>, span: Span) {
        let Root::Variable { index, whole } = self.root(pointer) else { return };
        let name = self.name(pointer);
        let value = self.taint(value).join(self.taint(pointer));
        let value = value.because(span, || format!("`{name}` gets a value that is not the same for all invocations"));
        let control = self.state.control.clone();
        let control = control.because(span, || format!("`{name}` is assigned by some invocations only"));
        self.write(index, whole, value.join(control));
    }

    fn write(&mut self, index: usize, whole: bool, taint: Taint) {
        let variable = &mut self.state.variables[index];
        *variable = if whole { taint } else { variable.clone().join(taint) };
    }

    fn call(
        &mut self,
        callee: Handle<Function>,
        arguments: &[Handle<Expression>],
        result: Option<Handle<Expression>>,
        span: Span,
    ) {
        let function: &'a Function = &self.analysis.module.functions[callee];
        let name = function.name.as_deref().unwrap_or_default();
        let passed: Vec<Argument> = arguments
            .iter()
            .zip(&function.arguments)
            .map(|(&argument, declared)| {
                let Argument { value, content } = self.argument(argument, declared.ty);
                let value = value.because(span, || format!("`{name}` is called here with a value that differs"));
                Argument { value, content }
            })
            .collect();
        let control = self.state.control.clone();
        let control = control.because(span, || format!("`{name}` is called here"));
        let levels = passed.iter().map(|argument| (argument.value.level, argument.content.level)).collect();
        let key = (callee, levels, control.level);
        let outcome = match self.analysis.calls.get(&key) {
            Some(outcome) => outcome.clone(),
            None => {
                let outcome = Walk::run(&mut *self.analysis, function, passed, control);
                self.analysis.calls.insert(key, outcome.clone());
                outcome
            }
        };
        for (&argument, content) in arguments.iter().zip(outcome.contents) {
            if let Root::Variable { index, whole } = self.root(argument) {
                self.write(index, whole, content);
            }
        }
        if let Some(result) = result {
            self.values.insert(result, outcome.value);
        }
    }

    fn argument(&self, argument: Handle<Expression>, ty: Handle<naga::Type>) -> Argument {
        let is_pointer =
            matches!(self.analysis.module.types[ty].inner, TypeInner::Pointer { .. } | TypeInner::ValuePointer { .. });
        let content = if is_pointer { self.content(argument) } else { Taint::default() };
        Argument { value: self.taint(argument), content }
    }

    // --- what is required

    fn barrier(&mut self, flags: Barrier, span: Span) {
        if flags.contains(Barrier::SUB_GROUP) {
            return self.require(Rule::Subgroup, span, "subgroupBarrier");
        }
        let name = match flags {
            Barrier::STORAGE => "storageBarrier",
            Barrier::TEXTURE => "textureBarrier",
            _ => "workgroupBarrier",
        };
        self.require(Rule::Barrier, span, name);
    }

    fn subgroup(&mut self, result: Handle<Expression>, span: Span) {
        self.require(Rule::Subgroup, span, "a subgroup operation");
        // Also where one subgroup gets one value: browsers do not look that closely.
        let text = "the result of a subgroup operation may differ between invocations".to_owned();
        self.values.insert(result, Taint::source(Level::Invocation, span, text));
    }

    /// Everyone who has to take part has to arrive.
    fn require(&mut self, rule: Rule, span: Span, what: &str) {
        let control = self.state.control.clone();
        if control.level > rule.allowed() {
            let message = format!("{what} is not reached by all invocations of a {} alike", rule.group());
            self.violation(rule, span, message, &control);
        }
    }

    fn require_uniform(&mut self, rule: Rule, value: Handle<Expression>, span: Span, what: &str) {
        let taint = self.taint(value);
        if taint.level > rule.allowed() {
            let message = format!("{what} is not the same for all invocations of a {}", rule.group());
            self.violation(rule, span, message, &taint);
        }
    }

    fn violation(&mut self, rule: Rule, span: Span, message: String, taint: &Taint) {
        let start = span.to_range().unwrap_or_default().start;
        let violation = Violation { rule, span, message, why: taint.why.clone() };
        self.analysis.violations.entry((start, rule)).or_insert(violation);
    }

    // --- values

    fn taint(&self, expression: Handle<Expression>) -> Taint {
        match self.values.get(&expression) {
            Some(taint) => taint.clone(),
            None => self.evaluate(expression),
        }
    }

    fn all<const N: usize>(&self, operands: [Option<Handle<Expression>>; N]) -> Taint {
        operands.into_iter().flatten().map(|operand| self.taint(operand)).fold(Taint::default(), Taint::join)
    }

    fn evaluate(&self, expression: Handle<Expression>) -> Taint {
        match self.function.expressions[expression] {
            Expression::Literal(_)
            | Expression::Constant(_)
            | Expression::Override(_)
            | Expression::ZeroValue(_)
            | Expression::GlobalVariable(_)
            | Expression::LocalVariable(_)
            | Expression::ImageQuery { .. } => Taint::default(),
            Expression::Compose { ref components, .. } => {
                components.iter().map(|&part| self.taint(part)).fold(Taint::default(), Taint::join)
            }
            Expression::Access { base, index } => self.all([Some(base), Some(index)]),
            Expression::AccessIndex { base: operand, .. }
            | Expression::Splat { value: operand, .. }
            | Expression::Swizzle { vector: operand, .. }
            | Expression::Unary { expr: operand, .. }
            | Expression::Relational { argument: operand, .. }
            | Expression::As { expr: operand, .. }
            | Expression::ArrayLength(operand) => self.taint(operand),
            Expression::Binary { left, right, .. } => self.all([Some(left), Some(right)]),
            Expression::Select { condition, accept, reject } => self.all([condition, accept, reject].map(Some)),
            Expression::Math { arg, arg1, arg2, arg3, .. } => self.all([Some(arg), arg1, arg2, arg3]),
            Expression::FunctionArgument(index) => self.arguments[index as usize].value.clone(),
            Expression::Load { pointer } => self.taint(pointer).join(self.content(pointer)),
            _ => {
                let span = self.function.expressions.get_span(expression);
                let text = format!("`{}` is not known to be the same for all invocations", self.analysis.text(span));
                Taint::source(Level::Invocation, span, text)
            }
        }
    }

    fn root(&self, pointer: Handle<Expression>) -> Root {
        let mut whole = true;
        let mut at = pointer;
        loop {
            at = match self.function.expressions[at] {
                Expression::Access { base, .. } | Expression::AccessIndex { base, .. } => base,
                Expression::LocalVariable(variable) => return Root::Variable { index: variable.index(), whole },
                Expression::FunctionArgument(index) => {
                    let index = self.function.local_variables.len() + index as usize;
                    return Root::Variable { index, whole };
                }
                Expression::GlobalVariable(variable) => return Root::Global(variable),
                _ => return Root::Unknown,
            };
            whole = false;
        }
    }

    /// What is behind a pointer, whatever the index.
    fn content(&self, pointer: Handle<Expression>) -> Taint {
        let span = self.function.expressions.get_span(pointer);
        match self.root(pointer) {
            Root::Variable { index, .. } => self.state.variables[index].clone(),
            Root::Global(variable) => {
                let variable = &self.analysis.module.global_variables[variable];
                self.analysis.memory(variable.space, variable.name.as_deref().unwrap_or("a variable"), span)
            }
            Root::Unknown => {
                let text = format!("`{}` is not known to be the same for all", self.analysis.text(span));
                Taint::source(Level::Invocation, span, text)
            }
        }
    }

    /// The variable behind a pointer, for people.
    fn name(&self, pointer: Handle<Expression>) -> String {
        let locals = &self.function.local_variables;
        let name = match self.root(pointer) {
            Root::Variable { index, .. } if index < locals.len() => {
                locals.iter().nth(index).and_then(|(_, variable)| variable.name.clone())
            }
            Root::Variable { index, .. } => self.function.arguments[index - locals.len()].name.clone(),
            _ => None,
        };
        name.unwrap_or_else(|| "a variable".to_owned())
    }
}
