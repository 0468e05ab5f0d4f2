/**
 * What the tensors of a LoRA file change, read off their names. Every layout names a layer of the network, officially
 * (ComfyUI, kohya-ss/sd-scripts) or as diffusers does, after a prefix that tells the network. Trainers that write
 * underscores for dots lose nothing by it, so layers are looked up in that form.
 */

import type { PartName } from './checkpoint.ts';

/** A network that a LoRA can change. */
export type LoraPart = Exclude<PartName, 'vae'>;

/** What a tensor is to its layer: with `down` applied first, the change is `up @ down`, scaled by `alpha` / rank. */
export type LoraRole = 'down' | 'up' | 'alpha';

/** What a layer of a LoRA changes. */
export interface LoraTarget {
  readonly part: LoraPart;
  /** The weight, as in `expected.ts`. */
  readonly weight: string;
  /** Which third of the weight's rows: diffusers keeps queries (0), keys (1) and values (2) apart. */
  readonly third?: number;
  /**
   * Whether scale stands before shift, as in diffusers, so that the halves of the rows are exchanged: always, or
   * where the rows are no more than a shift and a scale, which is so in the context's last block.
   */
  readonly swapped?: 'always' | 'last block';
  /** The layer's name after the prefix, as it stands in the file. */
  readonly module: string;
}

type Layer = Pick<LoraTarget, 'weight' | 'third' | 'swapped'>;

/** Layers by diffusers' names, `#` for the number of the block (diffusers' `SD3Transformer2DModel`). */
const diffusersLayers: Readonly<Record<string, Layer>> = {
  'pos_embed.proj': { weight: 'x_embedder.proj' },
  'time_text_embed.timestep_embedder.linear_1': { weight: 't_embedder.mlp.0' },
  'time_text_embed.timestep_embedder.linear_2': { weight: 't_embedder.mlp.2' },
  'time_text_embed.text_embedder.linear_1': { weight: 'y_embedder.mlp.0' },
  'time_text_embed.text_embedder.linear_2': { weight: 'y_embedder.mlp.2' },
  context_embedder: { weight: 'context_embedder' },
  'transformer_blocks.#.norm1.linear': { weight: 'joint_blocks.#.x_block.adaLN_modulation.1' },
  'transformer_blocks.#.norm1_context.linear': {
    weight: 'joint_blocks.#.context_block.adaLN_modulation.1',
    swapped: 'last block',
  },
  'transformer_blocks.#.attn.to_q': { weight: 'joint_blocks.#.x_block.attn.qkv', third: 0 },
  'transformer_blocks.#.attn.to_k': { weight: 'joint_blocks.#.x_block.attn.qkv', third: 1 },
  'transformer_blocks.#.attn.to_v': { weight: 'joint_blocks.#.x_block.attn.qkv', third: 2 },
  'transformer_blocks.#.attn.to_out.0': { weight: 'joint_blocks.#.x_block.attn.proj' },
  'transformer_blocks.#.attn.add_q_proj': { weight: 'joint_blocks.#.context_block.attn.qkv', third: 0 },
  'transformer_blocks.#.attn.add_k_proj': { weight: 'joint_blocks.#.context_block.attn.qkv', third: 1 },
  'transformer_blocks.#.attn.add_v_proj': { weight: 'joint_blocks.#.context_block.attn.qkv', third: 2 },
  'transformer_blocks.#.attn.to_add_out': { weight: 'joint_blocks.#.context_block.attn.proj' },
  'transformer_blocks.#.attn2.to_q': { weight: 'joint_blocks.#.x_block.attn2.qkv', third: 0 },
  'transformer_blocks.#.attn2.to_k': { weight: 'joint_blocks.#.x_block.attn2.qkv', third: 1 },
  'transformer_blocks.#.attn2.to_v': { weight: 'joint_blocks.#.x_block.attn2.qkv', third: 2 },
  'transformer_blocks.#.attn2.to_out.0': { weight: 'joint_blocks.#.x_block.attn2.proj' },
  'transformer_blocks.#.ff.net.0.proj': { weight: 'joint_blocks.#.x_block.mlp.fc1' },
  'transformer_blocks.#.ff.net.2': { weight: 'joint_blocks.#.x_block.mlp.fc2' },
  'transformer_blocks.#.ff_context.net.0.proj': { weight: 'joint_blocks.#.context_block.mlp.fc1' },
  'transformer_blocks.#.ff_context.net.2': { weight: 'joint_blocks.#.context_block.mlp.fc2' },
  'norm_out.linear': { weight: 'final_layer.adaLN_modulation.1', swapped: 'always' },
  proj_out: { weight: 'final_layer.linear' },
};

const clipLayers = [
  'self_attn.q_proj',
  'self_attn.k_proj',
  'self_attn.v_proj',
  'self_attn.out_proj',
  'mlp.fc1',
  'mlp.fc2',
];
const t5Layers = [
  ...['q', 'k', 'v', 'o'].map((projection) => `0.SelfAttention.${projection}`),
  ...['wi_0', 'wi_1', 'wo'].map((projection) => `1.DenseReluDense.${projection}`),
];

const clipNames = clipLayers.map((layer) => `text_model.encoder.layers.#.${layer}`);
const officialNames: Readonly<Record<LoraPart, readonly string[]>> = {
  transformer: Object.values(diffusersLayers).map(({ weight }) => weight),
  clipL: clipNames,
  // CLIP-L has a projection, too, which Stable Diffusion 3 leaves out.
  clipG: [...clipNames, 'text_projection'],
  t5: t5Layers.map((layer) => `encoder.block.#.layer.${layer}`),
};

function underscored(name: string): string {
  return name.replaceAll('.', '_');
}

/** What diffusers' names begin with, in tensors and in the metadata; its pipeline for Stable Diffusion 3 reads no T5. */
export const diffusersPrefixes: Readonly<Record<LoraPart, string>> = {
  transformer: 'transformer',
  clipL: 'text_encoder',
  clipG: 'text_encoder_2',
  t5: 'text_encoder_3',
};

/** Where diffusers keeps PEFT's configuration of each network (diffusers' `LORA_ADAPTER_METADATA_KEY`). */
export const ADAPTER_METADATA_KEY = 'lora_adapter_metadata';

const kohyaPrefixes: Readonly<Record<LoraPart, string>> = {
  transformer: 'lora_unet',
  clipL: 'lora_te1',
  clipG: 'lora_te2',
  t5: 'lora_te3',
};

/** A weight's layer in the layout of kohya-ss/sd-scripts; undefined where no layer of that network has the weight. */
export function kohyaLayer(part: LoraPart, weight: string): string | undefined {
  const named = officialLayer(part, weight);
  return named && `${kohyaPrefixes[part]}_${underscored(named.layer)}`;
}

/**
 * The layers that make up a weight in diffusers' layout, `module` without the prefix; none where no layer of that
 * network has the weight.
 */
export function diffusersModules(part: LoraPart, weight: string): Omit<LoraTarget, 'part' | 'weight'>[] {
  const named = officialLayer(part, weight);
  if (!named) return [];
  if (part !== 'transformer') return [{ module: named.layer }];
  return Object.entries(diffusersLayers)
    .filter(([, { weight: official }]) => official === named.pattern)
    .map(([name, { weight: _, ...how }]) => ({ module: name.replace('#', named.block), ...how }));
}

/** A weight without its ending, with `#` for the number of the block, if it is one that a LoRA can change. */
function officialLayer(
  part: LoraPart,
  weight: string,
): { readonly layer: string; readonly pattern: string; readonly block: string } | undefined {
  const layer = /^(.*)\.weight$/.exec(weight)?.[1];
  if (layer === undefined) return undefined;
  const block = /^(?:joint_blocks|text_model\.encoder\.layers|encoder\.block)\.(\d+)\./.exec(layer)?.[1] ?? '#';
  const pattern = layer.replace(`.${block}.`, '.#.');
  return officialNames[part].includes(pattern) ? { layer, pattern, block } : undefined;
}

/** Layers of each network by their underscored names. */
const layers: Readonly<Record<LoraPart, ReadonlyMap<string, Layer>>> = {
  transformer: layerTable(officialNames.transformer, diffusersLayers),
  clipL: layerTable(officialNames.clipL),
  clipG: layerTable(officialNames.clipG),
  t5: layerTable(officialNames.t5),
};

function layerTable(official: readonly string[], others: Readonly<Record<string, Layer>> = {}): Map<string, Layer> {
  return new Map([
    ...official.map((weight) => [underscored(weight), { weight }] as const),
    ...Object.entries(others).map(([name, layer]) => [underscored(name), layer] as const),
  ]);
}

/**
 * What names begin with: kohya-ss/sd-scripts' `lora_unet_` and `lora_te1_` to `lora_te3_` with underscores for dots,
 * OneTrainer's `lora_transformer_` and SimpleTuner's `lycoris_`; diffusers' `transformer.` and `text_encoder.` to
 * `text_encoder_3.`; ComfyUI's `diffusion_model.` and `text_encoders.`; or nothing.
 */
const prefixes: readonly { readonly part: LoraPart; readonly begins: RegExp }[] = [
  { part: 'clipL', begins: /^(lora_te1_|text_encoder\.|text_encoders\.clip_l\.transformer\.)/ },
  { part: 'clipG', begins: /^(lora_te2_|text_encoder_2\.|text_encoders\.clip_g\.transformer\.)/ },
  { part: 't5', begins: /^(lora_te3_|text_encoder_3\.|text_encoders\.t5xxl\.transformer\.)/ },
  {
    part: 'transformer',
    begins: /^(lora_unet_|lora_transformer_|lycoris_|transformer\.|(model\.)?diffusion_model\.|)/,
  },
];

/** Layouts by what their names begin with; the last has no prefix. */
const layouts: readonly { readonly begins: RegExp; readonly layout: string }[] = [
  { begins: /^lora_(unet|te[123])_/, layout: 'kohya' },
  { begins: /^lora_transformer_/, layout: 'OneTrainer' },
  { begins: /^lycoris_/, layout: 'LyCORIS' },
  { begins: /(^|\.)base_model\.model\./, layout: 'PEFT' },
  { begins: /^(transformer|text_encoder(_[23])?)\./, layout: 'diffusers' },
  { begins: /^((model\.)?diffusion_model|text_encoders)\./, layout: 'ComfyUI' },
  { begins: /^/, layout: 'without prefix' },
];

/** What the layout of a tensor's name is called. */
export function loraLayout(name: string): string {
  return layouts.find(({ begins }) => begins.test(name))!.layout;
}

/** PEFT's wrapper around a model, before or after the prefix. */
const wrapper = /^((?:transformer|text_encoder(?:_[23])?)\.)?base_model\.model\./;

/** What a layer changes; undefined where no network of Stable Diffusion 3 has it. */
export function loraTarget(layer: string): LoraTarget | undefined {
  const name = layer.replace(wrapper, '$1');
  const { part, begins } = prefixes.find((prefix) => prefix.begins.test(name))!;
  const module = name.replace(begins, '');
  const plain = underscored(module);
  const block = /(?:_blocks?|_layers)_(\d+)_/.exec(plain)?.[1] ?? '#';
  const found = layers[part].get(plain.replace(`_${block}_`, '_#_'));
  return found && { ...found, part, module, weight: `${found.weight.replace('#', block)}.weight` };
}

/**
 * How names end: kohya's `lora_down.weight`, PEFT's `lora_A.weight`, with the adapter's name between in files that
 * PEFT itself wrote, and diffusers' older `lora.down.weight`, `_lora.down.weight`, `lora_linear_layer.down.weight`.
 */
const endings: readonly { readonly role: LoraRole; readonly ends: RegExp }[] = [
  { role: 'down', ends: /(\.lora_(down|A)(\.\w+)?|[._]lora(_linear_layer)?\.down)\.weight$/ },
  { role: 'up', ends: /(\.lora_(up|B)(\.\w+)?|[._]lora(_linear_layer)?\.up)\.weight$/ },
  { role: 'alpha', ends: /([._]lora)?\.alpha$/ },
];

/** The layer a tensor belongs to, prefix included, and what it is to it; undefined where it is no part of a LoRA. */
export function loraKey(name: string): { readonly layer: string; readonly role: LoraRole } | undefined {
  for (const { role, ends } of endings) {
    const at = name.search(ends);
    if (at > 0) return { layer: name.slice(0, at), role };
  }
  return undefined;
}

/** Models whose LoRAs are handed around, by the layers that Stable Diffusion 3 does not have. */
const foreignModels: readonly { readonly named: RegExp; readonly model: string }[] = [
  { named: /(input|output)_blocks[._]\d/, model: 'Stable Diffusion XL' },
  { named: /(down|up)_blocks[._]\d|mid_block[._]/, model: 'Stable Diffusion 1, 2 or XL' },
  { named: /(double|single)_blocks[._]\d|single_transformer_blocks[._]\d/, model: 'FLUX' },
];

/** The other model that a LoRA is for and the name that tells it; undefined where none does. */
export function foreignLora(names: readonly string[]): { readonly name: string; readonly model: string } | undefined {
  for (const { named, model } of foreignModels) {
    const name = names.find((candidate) => named.test(candidate));
    if (name !== undefined) return { name, model };
  }
  return undefined;
}

/** Changes that are not `up @ down`, or not only (LyCORIS; PEFT), by the tensors they have. */
const otherKinds: readonly { readonly named: RegExp; readonly kind: string }[] = [
  { named: /\.(dora_scale|lora_magnitude_vector)(\.|$)/, kind: 'DoRA' },
  { named: /\.hada_/, kind: 'LoHa' },
  { named: /\.lokr_/, kind: 'LoKr' },
  { named: /\.lora_mid\./, kind: 'LoCon in Tucker form' },
  { named: /\.oft_(blocks|diag|R)(\.|$)/, kind: 'OFT' },
  { named: /\.[ab][12]\.weight$/, kind: 'GLoRA' },
];

/** The kind of a change that this version does not read and the name that tells it; undefined where none does. */
export function otherLoraKind(names: readonly string[]): { readonly name: string; readonly kind: string } | undefined {
  for (const { named, kind } of otherKinds) {
    const name = names.find((candidate) => named.test(candidate));
    if (name !== undefined) return { name, kind };
  }
  return undefined;
}
