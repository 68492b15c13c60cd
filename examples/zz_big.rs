use wgmoe::*; use wgmoe::bench::Workload;
fn main(){ let ctx=Context::new(&DeviceChoice::from_env()).unwrap();
 let routing = Routing { scores: Scores::Softmax, renormalize: true };
 for (t,v) in [(1u32<<14,"vec"),(1<<16,"vec"),(1<<17,"vec"),(1<<18,"vec"),(1<<18,"tiled"),(1<<18,"subgroup")] {
  let config = MoeConfig::new(8,12,2,1,routing,Activation::Swiglu).unwrap();
  let w=Workload::new(config.clone(),6.0,3).unwrap(); let x=w.input(t).unwrap();
  let layer=MoeLayer::with_options(&ctx,config.clone(),&w.weights,&LayerOptions{matmul:v.parse().ok(),..Default::default()}).unwrap();
  let y=layer.forward(&x).unwrap(); let d=layer.routing().unwrap();
  let logits=d.router_logits.iter().map(|&l| l as f64).collect();
  let own=reference::router::route(&config,logits);
  let f=reference::forward_with_routing(&config,&w.weights,&x,own);
  let bad:Vec<usize>=(0..t as usize).filter(|&i| (0..8).any(|c| (f.y[i*8+c]-y[i*8+c] as f64).abs()>1e-3)).collect();
  println!("t={t} {v} bad rows {} of {} tokens/expert {:?} first bad {:?} experts {:?} rows {:?}", bad.len(), t, d.tokens_per_expert, &bad[..bad.len().min(5)], bad.iter().take(5).map(|&i| d.topk_experts[i]).collect::<Vec<_>>(), bad.iter().take(5).map(|&i| f.permutation.row_of_assignment[i]).collect::<Vec<_>>());
 }}
