// tiles_dense: every expert has every token: shared experts, and projections of the whole layer. No entry point.
// Rows are experts times tokens: row e * num_tokens + t.

struct Tile {
    expert: u32,
    first_row: u32,
    num_rows: u32,
}

fn find_tile(slot: u32) -> Tile {
    let tiles = (params.num_assignments + params.tile_m - 1u) / params.tile_m; // of an expert
    let first = (slot % tiles) * params.tile_m;
    let expert = slot / tiles;
    return Tile(expert, expert * params.num_assignments + first, min(params.tile_m, params.num_assignments - first));
}

fn due_slots() -> vec2<u32> {
    return vec2<u32>(0u, params.num_tile_slots);
}

// Row i of the tile; past its end the last row again, so that every lane has something to read.
fn tile_row(tile: Tile, i: u32) -> u32 {
    return tile.first_row + min(i, tile.num_rows - 1u);
}

fn token_of(row: u32) -> u32 {
    return row % params.num_assignments;
}
