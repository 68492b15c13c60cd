// drop_none: every choice is kept. No entry point.

fn drop_choices(at: Place) {}
