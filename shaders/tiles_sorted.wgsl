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
