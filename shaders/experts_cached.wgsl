// experts_cached: some experts are on the device, wherever the host put them. No entry point.

@group(0) @binding(8) var<storage, read> place_of_expert: array<u32>; // [num_experts], DROPPED: not there, or not due

const PLACES_IN_ORDER: bool = false;

// Where the weights of an expert are, counted in experts.
fn place_of(expert: u32) -> u32 {
    // Surplus tiles belong to nobody.
    if expert >= params.num_experts { return DROPPED; }
    return place_of_expert[expert];
}
