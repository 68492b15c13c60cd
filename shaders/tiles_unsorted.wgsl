// tiles_unsorted: for a few tokens, tiles found by scanning the assignments, so that no sort is needed. No entry point.
//
// Rows are assignments: row a is assignment a. Slot a holds a tile if a is assignment number 0, 4, 8, ... of its
// expert; the tile is a and the next three of that expert. The other slots return at once.

struct Tile {
    expert: u32, // num_experts: nothing to do
    num_rows: u32,
    rows: vec4<u32>,
}

@group(0) @binding(3) var<storage, read> topk_experts: array<u32>; // [num_tokens, top_k]

// One return only: FXC takes a value that is returned from two places for uninitialised, and barriers depend on this one.
fn find_tile(slot: u32) -> Tile {
    let expert = topk_experts[slot];
    var earlier = 0u;
    for (var a = 0u; a < slot; a++) {
        earlier += select(0u, 1u, topk_experts[a] == expert);
    }
    var tile = Tile(params.num_experts, 0u, vec4<u32>(0u));
    if earlier % 4u == 0u {
        tile = Tile(expert, 1u, vec4<u32>(slot));
        for (var a = slot + 1u; a < params.num_assignments && tile.num_rows < 4u; a++) {
            if topk_experts[a] == expert {
                // Lanes past the tile's end repeat its last row.
                if tile.num_rows == 1u { tile.rows.y = a; }
                if tile.num_rows <= 2u { tile.rows.z = a; }
                tile.rows.w = a;
                tile.num_rows++;
            }
        }
    }
    return tile;
}

fn due_slots() -> vec2<u32> {
    return vec2<u32>(0u, params.num_tile_slots);
}

fn tile_row(tile: Tile, i: u32) -> u32 {
    return tile.rows[i];
}

fn assignment_of(row: u32) -> u32 {
    return row;
}

fn token_of(row: u32) -> u32 {
    return row / params.top_k;
}
