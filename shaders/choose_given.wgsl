// choose_given: topk_experts is there already, from the caller or from a token table. No entry point.

fn choose(at: Place, lane: u32) {}
