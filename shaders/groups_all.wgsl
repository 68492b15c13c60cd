// groups_all: every expert may be chosen. No entry point.

fn mask_groups(at: Place, lane: u32) {}
