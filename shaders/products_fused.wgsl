// products_fused: the router's dot products, made where they are used. No entry point.
// K_LANES lanes share the dot products of 4 tokens x 4 rows.

@group(0) @binding(1) var<storage, read> router_weights: array<vec4<f32>>; // [num_rows, 4 * ceil(hidden_size / 4)]

const EXPERTS: u32 = 4u;

// Sums of four tokens; each vec4 is four experts.
struct Sums { t0: vec4<f32>, t1: vec4<f32>, t2: vec4<f32>, t3: vec4<f32> }

fn compute_logits(first_token: u32, lane: u32) {
    let h = params.hidden_size;
    let k4 = (h + 3u) / 4u;
    let last_token = params.num_tokens - 1u;
    let alone = first_token == last_token;
    let t1 = min(first_token + 1u, last_token);
    let t2 = min(first_token + 2u, last_token);
    let t3 = min(first_token + 3u, last_token);
    // EXPERTS * (WG_SIZE / K_LANES) experts at a time
    for (var block = params.first_row; block < params.num_rows; block += EXPERTS * (WG_SIZE / K_LANES)) {
        let first_expert = block + EXPERTS * (lane / K_LANES);
        var sums = Sums(vec4<f32>(0.0), vec4<f32>(0.0), vec4<f32>(0.0), vec4<f32>(0.0));
        if first_expert < params.num_rows {
            if alone {
                for (var k = lane % K_LANES; k < k4; k += K_LANES) {
                    sums.t0 = step(sums.t0, seen_input4(first_token, h, k), load_router4x4(first_expert, k4, k));
                }
            } else {
                for (var k = lane % K_LANES; k < k4; k += K_LANES) {
                    let w = load_router4x4(first_expert, k4, k);
                    sums.t0 = step(sums.t0, seen_input4(first_token, h, k), w);
                    sums.t1 = step(sums.t1, seen_input4(t1, h, k), w);
                    sums.t2 = step(sums.t2, seen_input4(t2, h, k), w);
                    sums.t3 = step(sums.t3, seen_input4(t3, h, k), w);
                }
            }
        }
        // Barriers inside: every lane takes part, also those without an expert.
        sums.t0 = reduce_k_lanes(sums.t0, lane);
        if !alone {
            sums.t1 = reduce_k_lanes(sums.t1, lane);
            sums.t2 = reduce_k_lanes(sums.t2, lane);
            sums.t3 = reduce_k_lanes(sums.t3, lane);
        }
        if lane % K_LANES == 0u {
            store_sums(first_token, first_expert, sums.t0);
            if !alone {
                store_sums(first_token + 1u, first_expert, sums.t1);
                store_sums(first_token + 2u, first_expert, sums.t2);
                store_sums(first_token + 3u, first_expert, sums.t3);
            }
        }
    }
}

// Inputs 4*k .. 4*k+3 of four rows, transposed. Past the last row: that row again.
fn load_router4x4(first_expert: u32, k4: u32, k: u32) -> mat4x4<f32> {
    let last = params.num_rows - 1u;
    return transpose(mat4x4<f32>(
        router_weights[min(first_expert, last) * k4 + k], router_weights[min(first_expert + 1u, last) * k4 + k],
        router_weights[min(first_expert + 2u, last) * k4 + k], router_weights[min(first_expert + 3u, last) * k4 + k]));
}

fn store_sums(token: u32, first_row: u32, sums: vec4<f32>) {
    if token >= params.num_tokens { return; }
    for (var i = 0u; i < EXPERTS; i++) { store_product(token, first_row + i, sums[i]); }
}
