/** Names of tensors in GGUF files, as the official safetensors files have them. */

/** llama.cpp's names within a layer of the T5 encoder (gguf-py's `tensor_mapping.py`) and T5's own. */
const t5Layer = new Map([
  ['attn_q', 'layer.0.SelfAttention.q'],
  ['attn_k', 'layer.0.SelfAttention.k'],
  ['attn_v', 'layer.0.SelfAttention.v'],
  ['attn_o', 'layer.0.SelfAttention.o'],
  ['attn_rel_b', 'layer.0.SelfAttention.relative_attention_bias'],
  ['attn_norm', 'layer.0.layer_norm'],
  ['ffn_gate', 'layer.1.DenseReluDense.wi_0'],
  ['ffn_up', 'layer.1.DenseReluDense.wi_1'],
  ['ffn_down', 'layer.1.DenseReluDense.wo'],
  ['ffn_norm', 'layer.1.layer_norm'],
]);

/** Names that end in these are the same for the whole network. */
const whole = new Map([
  ['token_embd.weight', 'shared.weight'],
  ['enc.output_norm.weight', 'encoder.final_layer_norm.weight'],
  // stable-diffusion.cpp with --convert-name; the values stay as they are.
  ['text_model.text_projection', 'text_projection.weight'],
]);

/**
 * The official name of a tensor of a GGUF file, with the prefix that the file gives it, if any. The transformer, the
 * VAE and the CLIP encoders have official names in the files of ComfyUI-GGUF and stable-diffusion.cpp; only the names
 * of T5 in files of llama.cpp and that of CLIP's projection differ. A name that is not known stays.
 */
export function officialName(ggufName: string): string {
  const layer = /^(|.*\.)enc\.blk\.(\d+)\.(\w+)\.weight$/.exec(ggufName);
  const inLayer = layer && t5Layer.get(layer[3]!);
  if (inLayer) return `${layer[1]}encoder.block.${layer[2]}.${inLayer}.weight`;
  for (const [from, to] of whole) {
    const prefix = ggufName.slice(0, -from.length);
    if (ggufName.endsWith(from) && (prefix === '' || prefix.endsWith('.'))) return prefix + to;
  }
  return ggufName;
}
