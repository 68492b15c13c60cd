//! A wgmoe layer as the MoE block of a model in candle: it has candle's `Module`, takes and gives candle's tensors, and agrees
//! with the same block written in candle's own operations.
//!
//! ```text
//! cargo run --release --manifest-path examples/candle_block/Cargo.toml
//! ```

use candle_core::{D, DType, Device, IndexOp, Module, Result, Tensor};
use wgmoe::{Context, DeviceChoice, MoeConfig, MoeLayer, MoeWeights};

const HIDDEN_SIZE: usize = 64;
const INTERMEDIATE_SIZE: usize = 48;
const NUM_EXPERTS: usize = 8;
const TOP_K: usize = 2;

/// The layer, wherever it runs. Candle's tensors stay on the CPU: activations go to the device and come back.
struct MoeBlock(MoeLayer);

impl Module for MoeBlock {
    /// `x [batch, sequence, hidden_size]`, f32.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let tokens = x.flatten_all()?.to_vec1::<f32>()?;
        let y = self.0.forward(&tokens).map_err(candle_core::Error::wrap)?;
        Tensor::from_vec(y, x.shape(), x.device())
    }
}

/// The same block in candle's operations, one expert after the other: what the layer is held to.
struct InCandle {
    router: Tensor,    // [experts, hidden]
    gate_proj: Tensor, // [experts, intermediate, hidden]
    up_proj: Tensor,
    down_proj: Tensor, // [experts, hidden, intermediate]
}

impl Module for InCandle {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let tokens = x.reshape(((), HIDDEN_SIZE))?;
        let logits = tokens.matmul(&self.router.t()?)?;
        // What a softmax would do to all experts cancels out where the chosen ones are divided by their sum.
        let scores = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?)?.exp()?;
        let mut rows = Vec::new();
        for (token, scores) in scores.to_vec2::<f32>()?.into_iter().enumerate() {
            let x = tokens.i(token)?.unsqueeze(0)?;
            let mut experts: Vec<usize> = (0..NUM_EXPERTS).collect();
            experts.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
            let sum: f32 = experts[..TOP_K].iter().map(|&expert| scores[expert]).sum();
            let mut y = Tensor::zeros((1, HIDDEN_SIZE), DType::F32, &Device::Cpu)?;
            for &expert in &experts[..TOP_K] {
                let gate = x.matmul(&self.gate_proj.i(expert)?.t()?)?.silu()?;
                let up = x.matmul(&self.up_proj.i(expert)?.t()?)?;
                let out = (gate * up)?.matmul(&self.down_proj.i(expert)?.t()?)?;
                y = (y + (out * f64::from(scores[expert] / sum))?)?;
            }
            rows.push(y);
        }
        Tensor::cat(&rows, 0)?.reshape(x.shape())
    }
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let tensor = |shape: &[usize]| Tensor::randn(0f32, 1.0 / (HIDDEN_SIZE as f32).sqrt(), shape, &Device::Cpu);
    let candle = InCandle {
        router: tensor(&[NUM_EXPERTS, HIDDEN_SIZE])?,
        gate_proj: tensor(&[NUM_EXPERTS, INTERMEDIATE_SIZE, HIDDEN_SIZE])?,
        up_proj: tensor(&[NUM_EXPERTS, INTERMEDIATE_SIZE, HIDDEN_SIZE])?,
        down_proj: tensor(&[NUM_EXPERTS, HIDDEN_SIZE, INTERMEDIATE_SIZE])?,
    };
    let values = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
    let weights = MoeWeights {
        router: values(&candle.router)?,
        gate_proj: values(&candle.gate_proj)?,
        up_proj: values(&candle.up_proj)?,
        down_proj: values(&candle.down_proj)?,
        ..MoeWeights::default()
    };
    let [h, i, e, k] = [HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_EXPERTS, TOP_K].map(|n| n as u32);
    let config = MoeConfig::builder(h, i).num_experts(e).top_k(k).build()?;
    let context = Context::new(&DeviceChoice::from_env())?;
    let block = MoeBlock(MoeLayer::new(&context, config, &weights)?);

    let x = Tensor::randn(0f32, 1.0, (2, 17, HIDDEN_SIZE), &Device::Cpu)?;
    let (ours, theirs) = (block.forward(&x)?, candle.forward(&x)?);
    let error = (ours - &theirs)?.abs()?.max_all()?.to_scalar::<f32>()? / theirs.abs()?.max_all()?.to_scalar::<f32>()?;
    println!("{:?} on {}: off by {error:.1e} of the largest output", x.shape(), context.device().name);
    if error.is_nan() || error > 1e-5 {
        return Err(format!("wgmoe and candle differ by {error:.1e}, expected at most 1e-5").into());
    }
    Ok(())
}
