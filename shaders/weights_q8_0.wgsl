// weights_q8_0: expert weights of GGUF's Q8_0: code * d, with an f16 d for each 32 inputs. No entry point.

// A quad: codes [k4, 4 inputs, 4 columns] i8, d [k4 / 8, 4 columns] f16.
@group(0) @binding(1) var<storage, read> weights: array<vec4<u32>>; // [page experts, num_columns / 4, quad_stride]

const SCALED_K4: u32 = 8u;

alias Scales = vec4<f32>;

fn load_scales(quad: u32, k: u32) -> Scales {
    let group = k / SCALED_K4;
    let pair = weights[quad * params.quad_stride + params.k4 + group / 2u];
    let d = select(pair.xy, pair.zw, group % 2u == 1u);
    return vec4<f32>(unpack2x16float(d.x), unpack2x16float(d.y));
}

fn load_weights4x4(quad: u32, k: u32, scales: Scales) -> mat4x4<f32> {
    let codes = weights[quad * params.quad_stride + k];
    return mat4x4<f32>(
        signed_bytes(codes.x) * scales,
        signed_bytes(codes.y) * scales,
        signed_bytes(codes.z) * scales,
        signed_bytes(codes.w) * scales);
}
