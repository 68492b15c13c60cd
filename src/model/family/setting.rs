//! Values of a description: fixed for the family, or computed from each model's configuration.

use crate::error::{Error, Result};
use crate::model::model_config::ModelConfig;
use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeOwned, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

/// Where settings are looked up.
#[derive(Clone, Copy)]
pub(crate) struct Scope<'a> {
    /// The model's configuration.
    pub config: &'a ModelConfig,
    /// The layer's number.
    pub layer: u32,
    /// The family's name, for messages.
    pub family: &'a str,
}

/// A value of type T, or how to compute one.
#[derive(Clone, Debug)]
pub(crate) struct Setting<T> {
    rule: Rule,
    of: PhantomData<T>,
}

#[derive(Clone, Debug)]
enum Rule {
    Literal(Value),
    Computed(Box<Computed>),
}

#[derive(Clone, Debug)]
struct Computed {
    source: Source,
    power: Option<f64>,
    times: Option<Operand>,
    divided_by: Option<Operand>,
    plus: Option<Operand>,
    minus: Option<Operand>,
    default: Option<Rule>,
}

#[derive(Clone, Debug)]
enum Source {
    Keys { keys: Vec<Key>, map: Option<BTreeMap<String, Rule>> },
    Value(Value),
    LayerBelow { below: Operand, then: Rule, otherwise: Rule },
}

/// A number, or a key of the configuration that holds one.
#[derive(Clone, Debug)]
enum Operand {
    Number(f64),
    Key(Key),
}

/// A place in the configuration: `name`, `outer.inner`, `list[0]`, `list[{layer}]`.
#[derive(Clone, Debug)]
pub(crate) struct Key {
    /// As it was written.
    pub text: String,
    /// Way down from the top.
    pub steps: Vec<Step>,
}

/// One step into a configuration.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    /// Of an object.
    Name(String),
    /// Of a list.
    Index(usize),
    /// Of a list with an entry for each layer.
    Layer,
}

/// A value, or the keys of which none was there.
type Found = Result<Value, Vec<String>>;

impl<T: DeserializeOwned> Setting<T> {
    /// The value; [`Error::BadFile`] if a key that it needs is missing.
    pub fn value(&self, field: &str, scope: Scope) -> Result<T> {
        match self.rule.evaluate(scope)? {
            Ok(value) => self.typed(value, scope),
            Err(missing) => Err(Error::BadFile {
                path: scope.config.path.clone(),
                message: format!(
                    "the configuration lacks {}, which family {:?} reads as {field}",
                    scope.config.quoted(&missing),
                    scope.family
                ),
            }),
        }
    }

    /// The value; `None` if a key that it needs is missing.
    pub fn optional(&self, scope: Scope) -> Result<Option<T>> {
        match self.rule.evaluate(scope)? {
            Ok(value) => self.typed(value, scope).map(Some),
            Err(_) => Ok(None),
        }
    }

    /// The value if it does not depend on any configuration.
    pub fn literal(&self) -> Option<T> {
        match &self.rule {
            Rule::Literal(value) => T::deserialize(value).ok(),
            Rule::Computed(_) => None,
        }
    }

    /// The keys that the value comes from, without those of defaults and arithmetic.
    pub fn keys(&self) -> Vec<String> {
        match &self.rule {
            Rule::Computed(computed) => computed.keys(),
            Rule::Literal(_) => Vec::new(),
        }
    }

    fn typed(&self, value: Value, scope: Scope) -> Result<T> {
        T::deserialize(&value).map_err(|error| {
            let keys = self.keys();
            let what = if keys.is_empty() { "a value".to_owned() } else { scope.config.quoted(&keys) };
            let message = format!("{what} of the configuration: {error}");
            Error::BadFile { path: scope.config.path.clone(), message }
        })
    }
}

impl Rule {
    fn evaluate(&self, scope: Scope) -> Result<Found> {
        match self {
            Rule::Literal(value) => Ok(Ok(value.clone())),
            Rule::Computed(computed) => match (computed.evaluate(scope)?, &computed.default) {
                (Err(missing), Some(default)) => Ok(default.evaluate(scope)?.map_err(|_| missing)),
                (found, _) => Ok(found),
            },
        }
    }

    /// What is written down must be of the right type, unless arithmetic is still done with it.
    fn check(&self, fits: &dyn Fn(&Value) -> Result<(), String>) -> Result<(), String> {
        let computed = match self {
            Rule::Literal(value) => return fits(value),
            Rule::Computed(computed) => computed,
        };
        let number = |value: &Value| match value {
            Value::Number(_) => Ok(()),
            other => Err(format!("{other} is not a number, which arithmetic needs")),
        };
        let inner = if computed.is_plain() { fits } else { &number };
        match &computed.source {
            Source::Keys { map, .. } => map.iter().flatten().try_for_each(|(_, rule)| rule.check(inner))?,
            Source::Value(value) => inner(value)?,
            Source::LayerBelow { then, otherwise, .. } => {
                then.check(inner)?;
                otherwise.check(inner)?;
            }
        }
        computed.default.as_ref().map_or(Ok(()), |default| default.check(fits))
    }
}

impl Computed {
    fn is_plain(&self) -> bool {
        self.power.is_none()
            && self.times.is_none()
            && self.divided_by.is_none()
            && self.plus.is_none()
            && self.minus.is_none()
    }

    fn keys(&self) -> Vec<String> {
        match &self.source {
            Source::Keys { keys, .. } => keys.iter().map(|key| key.text.clone()).collect(),
            _ => Vec::new(),
        }
    }

    /// `value ^ power * times / divided_by + plus - minus`
    fn evaluate(&self, scope: Scope) -> Result<Found> {
        let value = match self.source(scope)? {
            Ok(value) if !self.is_plain() => value,
            found => return Ok(found.map(whole)),
        };
        let bad = |message| Error::BadFile { path: scope.config.path.clone(), message };
        let Some(mut number) = value.as_f64() else {
            return Err(bad(format!("{} is {value}, expected a number", scope.config.quoted(&self.keys()))));
        };
        if let Some(power) = self.power {
            number = number.powf(power);
        }
        type Apply = fn(f64, f64) -> f64;
        let steps: [(&Option<Operand>, Apply); 4] = [
            (&self.times, |a, b| a * b),
            (&self.divided_by, |a, b| a / b),
            (&self.plus, |a, b| a + b),
            (&self.minus, |a, b| a - b),
        ];
        for (operand, apply) in steps {
            match operand.as_ref().map(|operand| operand.evaluate(scope)).transpose()? {
                None => {}
                Some(Ok(operand)) => number = apply(number, operand),
                Some(Err(missing)) => return Ok(Err(missing)),
            }
        }
        match serde_json::Number::from_f64(number) {
            Some(number) => Ok(Ok(whole(Value::Number(number)))),
            None => Err(bad(format!("{} leads to {number}, expected a number", scope.config.quoted(&self.keys())))),
        }
    }

    fn source(&self, scope: Scope) -> Result<Found> {
        match &self.source {
            Source::Value(value) => Ok(Ok(value.clone())),
            Source::LayerBelow { below, then, otherwise } => match below.evaluate(scope)? {
                Ok(below) if f64::from(scope.layer) < below => then.evaluate(scope),
                Ok(_) => otherwise.evaluate(scope),
                Err(missing) => Ok(Err(missing)),
            },
            Source::Keys { keys, map } => {
                let Some((key, value)) = scope.config.get(keys, scope.layer)? else { return Ok(Err(self.keys())) };
                let Some(map) = map else { return Ok(Ok(value.clone())) };
                let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                match map.get(&text).or_else(|| map.get("*")) {
                    Some(rule) => rule.evaluate(scope),
                    None => Err(Error::Unsupported {
                        what: format!("{key:?} = {text:?} in {}", scope.config.path.display()),
                        by: format!("by family {:?}", scope.family),
                        hint: format!("it knows {}", map.keys().cloned().collect::<Vec<_>>().join(", ")),
                    }),
                }
            }
        }
    }
}

impl Operand {
    fn evaluate(&self, scope: Scope) -> Result<Result<f64, Vec<String>>> {
        let key = match self {
            Operand::Number(number) => return Ok(Ok(*number)),
            Operand::Key(key) => key,
        };
        match scope.config.get(std::slice::from_ref(key), scope.layer)? {
            None => Ok(Err(vec![key.text.clone()])),
            Some((_, value)) => value.as_f64().map(Ok).ok_or_else(|| Error::BadFile {
                path: scope.config.path.clone(),
                message: format!("{:?} is {value}, expected a number", key.text),
            }),
        }
    }
}

/// `2.0` as `2`: configurations and arithmetic write whole numbers either way.
fn whole(value: Value) -> Value {
    match value.as_f64() {
        Some(number) if value.is_f64() && number.fract() == 0.0 && number.abs() < 9e15 => Value::from(number as i64),
        _ => value,
    }
}

impl Key {
    fn parse(text: &str) -> Result<Key, String> {
        let wrong = || format!("{text:?} is not a key such as name, outer.inner, list[0] or list[{{layer}}]");
        let mut steps = Vec::new();
        for part in text.split('.') {
            let (name, mut rest) = part.split_at(part.find('[').unwrap_or(part.len()));
            if name.is_empty() || name.contains([']', '{', '}']) {
                return Err(wrong());
            }
            steps.push(Step::Name(name.to_owned()));
            while !rest.is_empty() {
                let (index, after) = rest.strip_prefix('[').and_then(|rest| rest.split_once(']')).ok_or_else(wrong)?;
                steps.push(match index {
                    "{layer}" => Step::Layer,
                    number => Step::Index(number.parse().map_err(|_| wrong())?),
                });
                rest = after;
            }
        }
        Ok(Key { text: text.to_owned(), steps })
    }
}

// ---- reading a description ----

impl<'de, T: DeserializeOwned> Deserialize<'de> for Setting<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let rule = Rule::deserialize(deserializer)?;
        // A key's name in the place of a value is the most common slip.
        let hint = |value: &Value| match value {
            Value::String(key) => format!("; to read it from config.json write {{ from = {key:?} }}"),
            _ => String::new(),
        };
        rule.check(&|value| {
            let wrong = T::deserialize(value).err();
            wrong.map_or(Ok(()), |error| Err(format!("{error}{}", hint(value))))
        })
        .map_err(D::Error::custom)?;
        Ok(Setting { rule, of: PhantomData })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    from: Option<OneOrMore>,
    value: Option<Rule>,
    map: Option<BTreeMap<String, Rule>>,
    default: Option<Rule>,
    power: Option<f64>,
    times: Option<Operand>,
    divided_by: Option<Operand>,
    plus: Option<Operand>,
    minus: Option<Operand>,
    if_layer_below: Option<Operand>,
    then: Option<Rule>,
    #[serde(rename = "else")]
    otherwise: Option<Rule>,
}

impl Written {
    fn rule(self) -> Result<Rule, String> {
        let source = match (self.from, self.value, self.if_layer_below) {
            (Some(from), None, None) => {
                let keys = from.0.iter().map(|key| Key::parse(key)).collect::<Result<_, _>>()?;
                Source::Keys { keys, map: self.map }
            }
            (None, Some(Rule::Literal(value)), None) if self.map.is_none() => Source::Value(value),
            (None, None, Some(below)) if self.map.is_none() => match (self.then, self.otherwise) {
                (Some(then), Some(otherwise)) => {
                    return Ok(Rule::Computed(Box::new(Computed {
                        source: Source::LayerBelow { below, then, otherwise },
                        power: self.power,
                        times: self.times,
                        divided_by: self.divided_by,
                        plus: self.plus,
                        minus: self.minus,
                        default: self.default,
                    })));
                }
                _ => return Err("if_layer_below needs then and else".to_owned()),
            },
            _ => {
                return Err("a setting needs exactly one of from (with or without map), value and if_layer_below \
                            (with then and else)"
                    .to_owned());
            }
        };
        if self.then.is_some() || self.otherwise.is_some() {
            return Err("then and else belong to if_layer_below".to_owned());
        }
        Ok(Rule::Computed(Box::new(Computed {
            source,
            power: self.power,
            times: self.times,
            divided_by: self.divided_by,
            plus: self.plus,
            minus: self.minus,
            default: self.default,
        })))
    }
}

impl<'de> Deserialize<'de> for Rule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct RuleVisitor;
        impl<'de> Visitor<'de> for RuleVisitor {
            type Value = Rule;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value, or { from = \"key of config.json\", default = value }")
            }
            fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<Rule, E> {
                Ok(Rule::Literal(value.into()))
            }
            fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<Rule, E> {
                Ok(Rule::Literal(value.into()))
            }
            fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Rule, E> {
                Ok(Rule::Literal(whole(value.into())))
            }
            fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<Rule, E> {
                Ok(Rule::Literal(value.into()))
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Rule, A::Error> {
                Written::deserialize(MapAccessDeserializer::new(map))?.rule().map_err(A::Error::custom)
            }
        }
        deserializer.deserialize_any(RuleVisitor)
    }
}

impl<'de> Deserialize<'de> for Operand {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Rule::deserialize(deserializer)? {
            Rule::Literal(Value::Number(number)) => Ok(Operand::Number(number.as_f64().unwrap_or(f64::NAN))),
            Rule::Literal(Value::String(key)) => Key::parse(&key).map(Operand::Key).map_err(D::Error::custom),
            _ => Err(D::Error::custom("expected a number or a key of config.json")),
        }
    }
}

/// A string or a list of strings of which the first that fits is taken.
#[derive(Clone, Debug)]
pub(crate) struct OneOrMore(pub Vec<String>);

impl<'de> Deserialize<'de> for OneOrMore {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ListVisitor;
        impl<'de> Visitor<'de> for ListVisitor {
            type Value = OneOrMore;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of strings")
            }
            fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<OneOrMore, E> {
                Ok(OneOrMore(vec![value.to_owned()]))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<OneOrMore, A::Error> {
                let mut values = Vec::new();
                while let Some(value) = list.next_element()? {
                    values.push(value);
                }
                if values.is_empty() {
                    return Err(A::Error::custom("the list is empty"));
                }
                Ok(OneOrMore(values))
            }
        }
        deserializer.deserialize_any(ListVisitor)
    }
}
