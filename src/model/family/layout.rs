//! Tensor names of one way to store a layer, and how the numbers lie in them.

use super::setting::OneOrMore;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use std::collections::BTreeMap;
use std::fmt;

/// Every tensor that a layout can name. Their shapes are in `layer_reader.rs`.
pub(crate) const SLOTS: [&str; 29] = [
    "router",
    "router_bias",
    "selection_bias",
    "per_expert_scale",
    "weight_scale",
    "token_table",
    "router_noise",
    "group_router",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "down_proj",
    "gate_bias",
    "up_bias",
    "gate_up_bias",
    "down_bias",
    "latent_in",
    "latent_out",
    "router_norm",
    "expert_norm",
    "expert_out_norm",
    "routed_norm",
    "output_norm",
    "output_bias",
    "shared_gate_proj",
    "shared_up_proj",
    "shared_gate_up_proj",
    "shared_down_proj",
    "shared_gate",
];

/// A layout of this name is one of GGUF files, and tried for no others.
pub(crate) fn is_of_gguf(name: &str) -> bool {
    name == "gguf" || name.starts_with("gguf_")
}

/// All keys of a layout, for messages.
const KEYS: [&str; 36] = {
    let mut keys = ["prefix"; 36];
    let properties =
        ["prefix", "transposed", "interleaved", "up_first", "flattened", "shared_gate_in_router", "ignore"];
    let mut n = 0;
    while n < 36 {
        keys[n] = if n < 7 { properties[n] } else { SLOTS[n - 7] };
        n += 1;
    }
    keys
};

/// One `[tensors.NAME]` section.
#[derive(Clone, Debug, Default)]
pub(crate) struct Layout {
    /// In front of every name, with `{layer}` for the layer's number; the first whose tensors exist is taken.
    pub prefixes: Vec<String>,
    /// Names by slot.
    names: BTreeMap<&'static str, TensorNames>,
    /// Slots whose matrices are stored `[in, out]`.
    transposed: Vec<&'static str>,
    /// Fused slots whose gate and up rows alternate.
    interleaved: Vec<&'static str>,
    /// Fused slots with up before gate.
    up_first: Vec<&'static str>,
    /// All experts in one matrix, one below the other.
    pub flattened: bool,
    /// The last rows of the router are the gate of the shared experts.
    pub shared_gate_in_router: bool,
    /// Starts (or, after a `*`, ends) of names under the prefix that are not part of the layer.
    ignore: Vec<String>,
}

/// Names that a tensor can have: the first that exists is taken.
#[derive(Clone, Debug)]
pub(crate) struct TensorNames {
    /// Without the `?`.
    pub names: Vec<String>,
    /// The tensor may be missing.
    pub optional: bool,
}

impl Layout {
    /// Names of a slot.
    pub fn names(&self, slot: &str) -> Option<&TensorNames> {
        self.names.get(slot)
    }

    /// The slot is described.
    pub fn has(&self, slot: &str) -> bool {
        self.names.contains_key(slot)
    }

    /// Stored `[in, out]`.
    pub fn is_transposed(&self, slot: &str) -> bool {
        self.transposed.contains(&slot)
    }

    /// Gate and up rows alternate.
    pub fn is_interleaved(&self, slot: &str) -> bool {
        self.interleaved.contains(&slot)
    }

    /// Up comes first.
    pub fn is_up_first(&self, slot: &str) -> bool {
        self.up_first.contains(&slot)
    }

    /// A name under the prefix, without it, that belongs to something else.
    pub fn ignores(&self, name: &str) -> bool {
        self.ignore.iter().any(|pattern| match pattern.strip_prefix('*') {
            Some(end) => name.ends_with(end),
            None => name.starts_with(pattern.as_str()),
        })
    }

    /// The tensor that `name`, without the prefix, is called here.
    pub fn slot_of(&self, name: &str) -> Option<&'static str> {
        let is_it = |pattern: &String| match pattern.split_once("{expert}") {
            Some((start, end)) => {
                let number = name.strip_prefix(start).and_then(|rest| rest.strip_suffix(end));
                number.is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
            }
            None => pattern == name,
        };
        self.names.iter().find(|(_, names)| names.names.iter().any(is_it)).map(|(&slot, _)| slot)
    }

    /// Tensors without which this is not the layout: the router and a first projection.
    pub fn landmarks(&self) -> impl Iterator<Item = &TensorNames> {
        let first = ["gate_up_proj", "gate_proj", "up_proj"].into_iter().find_map(|slot| self.names(slot));
        self.names("router").into_iter().chain(first)
    }

    /// What types cannot say: the key that is wrong, and why.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        for prefix in &self.prefixes {
            check_placeholders(prefix, "{layer}").map_err(|message| ("prefix", message))?;
        }
        if self.prefixes.is_empty() {
            return Err((
                "prefix",
                "prefix is missing: what stands in front of every name, \"\" for nothing".to_owned(),
            ));
        }
        for (&slot, names) in &self.names {
            let known = if is_repeated(slot) { "{expert}" } else { "" };
            for name in &names.names {
                check_placeholders(name, known).map_err(|message| (slot, message))?;
                if self.flattened && is_repeated(slot) && !slot.starts_with("shared") && name.contains("{expert}") {
                    return Err((
                        "flattened",
                        format!("flattened is about one tensor of all experts, {slot} has {{expert}}"),
                    ));
                }
            }
        }
        if let Some(missing) = ["router", "down_proj"].into_iter().find(|slot| !self.has(slot)) {
            return Err(("prefix", format!("this layout must name {missing}")));
        }
        for [fused, gate, up] in FUSED {
            if self.has(fused) && (self.has(gate) || self.has(up)) {
                return Err((fused, format!("{fused} is {gate} and {up} in one tensor: name either that or those")));
            }
        }
        if !self.has("gate_up_proj") && !self.has("up_proj") {
            return Err(("prefix", "this layout must name either gate_proj and up_proj, or gate_up_proj".to_owned()));
        }
        if self.has("shared_down_proj") && !self.has("shared_gate_up_proj") && !self.has("shared_up_proj") {
            let message = "this layout must name either shared_gate_proj and shared_up_proj, or shared_gate_up_proj";
            return Err(("shared_down_proj", message.to_owned()));
        }
        for (key, slots) in
            [("transposed", &self.transposed), ("interleaved", &self.interleaved), ("up_first", &self.up_first)]
        {
            if let Some(slot) = slots.iter().find(|slot| !self.has(slot)) {
                return Err((key, format!("{key} is about {slot}, which this layout does not name")));
            }
        }
        if self.shared_gate_in_router && self.has("shared_gate") {
            return Err((
                "shared_gate",
                "the shared gate is a tensor or the last rows of the router, not both".to_owned(),
            ));
        }
        Ok(())
    }
}

/// A tensor of both first projections and its halves.
pub(crate) const FUSED: [[&str; 3]; 3] = [
    ["gate_up_proj", "gate_proj", "up_proj"],
    ["gate_up_bias", "gate_bias", "up_bias"],
    ["shared_gate_up_proj", "shared_gate_proj", "shared_up_proj"],
];

const MATRICES: [&str; 14] = [
    "router",
    "router_noise",
    "group_router",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "down_proj",
    "latent_in",
    "latent_out",
    "shared_gate_proj",
    "shared_up_proj",
    "shared_gate_up_proj",
    "shared_down_proj",
    "shared_gate",
];

/// There is one for each expert, or for each shared expert.
fn is_repeated(slot: &str) -> bool {
    matches!(slot, "gate_bias" | "up_bias" | "gate_up_bias" | "down_bias") || slot.ends_with("_proj")
}

/// `true` for the routed experts, or a list of slots.
#[derive(Deserialize)]
#[serde(untagged)]
enum Which {
    All(bool),
    These(Vec<String>),
}

impl Which {
    /// The slots meant, of `known`; `all` are those that `true` means, as far as they are described.
    fn slots(self, known: &[&'static str], all: &[&'static str], layout: &Layout) -> Result<Vec<&'static str>, String> {
        match self {
            Which::All(false) => Ok(Vec::new()),
            Which::All(true) => {
                let there: Vec<&str> = all.iter().copied().filter(|slot| layout.has(slot)).collect();
                // none there: the check reports the first
                Ok(if there.is_empty() { vec![all[0]] } else { there })
            }
            Which::These(names) => {
                let find = |name: &String| {
                    known.iter().copied().find(|slot| slot == name).ok_or_else(|| {
                        format!("{name:?} is none of the tensors that this can be about: {}", known.join(", "))
                    })
                };
                names.iter().map(find).collect()
            }
        }
    }
}

impl<'de> Deserialize<'de> for Layout {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct LayoutVisitor;
        impl<'de> Visitor<'de> for LayoutVisitor {
            type Value = Layout;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a layout: prefix, router, down_proj and other names of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Layout, A::Error> {
                let mut layout = Layout::default();
                let [mut transposed, mut interleaved, mut up_first] = [None, None, None];
                while let Some(key) = map.next_key::<String>()? {
                    match key.as_str() {
                        "prefix" => layout.prefixes = map.next_value::<OneOrMore>()?.0,
                        "transposed" => transposed = Some(map.next_value::<Which>()?),
                        "interleaved" => interleaved = Some(map.next_value::<Which>()?),
                        "up_first" => up_first = Some(map.next_value::<Which>()?),
                        "flattened" => layout.flattened = map.next_value()?,
                        "shared_gate_in_router" => layout.shared_gate_in_router = map.next_value()?,
                        "ignore" => layout.ignore = map.next_value::<OneOrMore>()?.0,
                        name => match SLOTS.into_iter().find(|slot| *slot == name) {
                            Some(slot) => {
                                let names = map.next_value::<OneOrMore>()?.0;
                                let optional = names.iter().any(|name| name.ends_with('?'));
                                let names =
                                    names.into_iter().map(|name| name.trim_end_matches('?').to_owned()).collect();
                                layout.names.insert(slot, TensorNames { names, optional });
                            }
                            None => {
                                map.next_value::<IgnoredAny>()?;
                                return Err(A::Error::unknown_field(name, &KEYS));
                            }
                        },
                    }
                }
                let routed = ["gate_up_proj", "gate_proj", "up_proj", "down_proj"];
                let fused = ["gate_up_proj", "gate_up_bias", "shared_gate_up_proj"];
                let slots = |which: Option<Which>, known: &[&'static str], all: &[&'static str]| match which {
                    None => Ok(Vec::new()),
                    Some(which) => which.slots(known, all, &layout).map_err(A::Error::custom),
                };
                let transposed = slots(transposed, &MATRICES, &routed)?;
                let interleaved = slots(interleaved, &fused, &fused[..2])?;
                let up_first = slots(up_first, &fused, &fused[..2])?;
                Ok(Layout { transposed, interleaved, up_first, ..layout })
            }
        }
        deserializer.deserialize_map(LayoutVisitor)
    }
}

/// The only braces in `name` are one `known` placeholder; an empty one allows none.
fn check_placeholders(name: &str, known: &str) -> Result<(), String> {
    let rest = if known.is_empty() { name.to_owned() } else { name.replacen(known, "", 1) };
    if !rest.contains(['{', '}']) {
        return Ok(());
    }
    let known = if known.is_empty() { "no placeholder" } else { known };
    Err(format!("{name:?} may hold {known} once and no other braces"))
}
