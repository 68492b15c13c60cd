// tiles_sorted: the tiles that permute made; a tile is a run of rows of one expert. No entry point.

struct Tile {
    expert: u32, // num_experts: a surplus slot, nothing to do
    first_row: u32,
    num_rows: u32,
}

@group(0) @binding(3) var<storage, read> tiles:             array<Tile>; // [num_tile_slots]
@group(0) @binding(4) var<storage, read> assignment_of_row: array<u32>;  // [num_rows]

fn find_tile(slot: u32) -> Tile {
    return tiles[slot];
}

// The slots that may hold tiles of this page: those of its experts.
fn due_slots() -> vec2<u32> {
    if !PLACES_IN_ORDER { return vec2<u32>(0u, params.num_tile_slots); }
    return vec2<u32>(first_slot(params.first_expert), first_slot(params.end_expert));
}

// The first slot of an expert, or of one after it, surplus slots last.
fn first_slot(expert: u32) -> u32 {
    var slot = 0u;
    var end = params.num_tile_slots;
    while slot < end {
        let middle = (slot + end) / 2u;
        if tiles[middle].expert < expert { slot = middle + 1u; } else { end = middle; }
    }
    return slot;
}

// Row i of the tile; past its end the last row again, so that every lane has something to read.
fn tile_row(tile: Tile, i: u32) -> u32 {
    return tile.first_row + min(i, tile.num_rows - 1u);
}

fn assignment_of(row: u32) -> u32 {
    return assignment_of_row[row];
}

fn token_of(row: u32) -> u32 {
    return assignment_of_row[row] / params.top_k;
}
