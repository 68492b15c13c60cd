// experts_cached: some experts are on the device, wherever the host put them. No entry point.

@group(0) @binding(8) var<storage, read> place_of_expert: array<u32>; // [num_experts], DROPPED: not there, or not due

const PLACES_IN_ORDER: bool = false;

// Where the weights of an expert are, counted in experts. Surplus tiles belong to nobody.
// One return only: FXC takes a value that is returned from two places for uninitialised, and barriers depend on this one.
fn place_of(expert: u32) -> u32 {
    var place = DROPPED;
    if expert < params.num_experts { place = place_of_expert[expert]; }
    return place;
}
