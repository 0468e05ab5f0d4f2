/**
 * diffusers' names for the weights of its folders `transformer/` (SD3Transformer2DModel) and `vae/` (AutoencoderKL),
 * and the official ones. The values are the same, some in another order: queries, keys and values lie apart, and where
 * a modulation has no gate, scale comes before shift (diffusers' AdaLayerNormContinuous).
 */

import { MmditxError } from '../errors.ts';
import { blockFormats } from './gguf-blocks.ts';
import { quote } from './quote.ts';
import { isBlockType, type Span, type WeightTensor } from './stored.ts';

type Tensors = ReadonlyMap<string, WeightTensor>;

const POSITION_TABLE = 'pos_embed.pos_embed';

/** Layers outside the blocks. */
const layers = new Map([
  ['pos_embed.proj', 'x_embedder.proj'],
  ['time_text_embed.timestep_embedder.linear_1', 't_embedder.mlp.0'],
  ['time_text_embed.timestep_embedder.linear_2', 't_embedder.mlp.2'],
  ['time_text_embed.text_embedder.linear_1', 'y_embedder.mlp.0'],
  ['time_text_embed.text_embedder.linear_2', 'y_embedder.mlp.2'],
  ['norm_out.linear', 'final_layer.adaLN_modulation.1'],
  ['proj_out', 'final_layer.linear'],
]);

const blockLayers = new Map([
  ['norm1.linear', 'x_block.adaLN_modulation.1'],
  ['attn.norm_q', 'x_block.attn.ln_q'],
  ['attn.norm_k', 'x_block.attn.ln_k'],
  ['attn.to_out.0', 'x_block.attn.proj'],
  ['attn2.norm_q', 'x_block.attn2.ln_q'],
  ['attn2.norm_k', 'x_block.attn2.ln_k'],
  ['attn2.to_out.0', 'x_block.attn2.proj'],
  ['ff.net.0.proj', 'x_block.mlp.fc1'],
  ['ff.net.2', 'x_block.mlp.fc2'],
  ['norm1_context.linear', 'context_block.adaLN_modulation.1'],
  ['attn.norm_added_q', 'context_block.attn.ln_q'],
  ['attn.norm_added_k', 'context_block.attn.ln_k'],
  ['attn.to_add_out', 'context_block.attn.proj'],
  ['ff_context.net.0.proj', 'context_block.mlp.fc1'],
  ['ff_context.net.2', 'context_block.mlp.fc2'],
]);

/** Queries, keys and values, which are one layer officially. */
const jointProjections = {
  'x_block.attn.qkv': ['attn.to_q', 'attn.to_k', 'attn.to_v'],
  'x_block.attn2.qkv': ['attn2.to_q', 'attn2.to_k', 'attn2.to_v'],
  'context_block.attn.qkv': ['attn.add_q_proj', 'attn.add_k_proj', 'attn.add_v_proj'],
};
const projections = new Map(
  Object.entries(jointProjections).flatMap(([joint, names]) => names.map((name, at) => [name, { joint, at }])),
);

/**
 * The weights of a whole transformer by their official names; names that are not diffusers' stay. A projection of which
 * queries, keys or values are missing is left out.
 * @throws MmditxError `unsupported-model` where the order of values cannot be changed
 */
export function officialTransformer(tensors: Tensors): Map<string, WeightTensor> {
  const lastBlock = lastIndex(tensors, /^transformer_blocks\.(\d+)\./);
  const official = new Map<string, WeightTensor>();
  const joints = new Map<string, (WeightTensor | undefined)[]>();
  for (const [name, weight] of tensors) {
    const [, block, layer = '', kind] = /^(?:transformer_blocks\.(\d+)\.)?(.+)\.(weight|bias)$/.exec(name) ?? [];
    const projection = block === undefined ? undefined : projections.get(layer);
    if (projection) {
      const joint = `joint_blocks.${block}.${projection.joint}.${kind}`;
      joints.set(joint, (joints.get(joint) ?? [undefined, undefined, undefined]).with(projection.at, weight));
      continue;
    }
    const to = block === undefined ? layers.get(layer) : blockLayers.get(layer);
    if (to === undefined) {
      official.set(name === POSITION_TABLE ? 'pos_embed' : name, weight);
      continue;
    }
    const scaleFirst = layer === 'norm_out.linear' || (layer === 'norm1_context.linear' && Number(block) === lastBlock);
    const officialName = `${block === undefined ? '' : `joint_blocks.${block}.`}${to}.${kind}`;
    official.set(officialName, scaleFirst ? halvesSwapped(weight) : weight);
  }
  for (const [name, [q, k, v]] of joints) if (q && k && v) official.set(name, rowsJoined([q, k, v]));
  return official;
}

/** Applied in this order. Attention has a second set of names, from older versions of diffusers. */
const vaeNames: readonly (readonly [RegExp, string])[] = [
  [/^(encoder\.down|decoder\.up)_blocks\.(\d+)\.resnets\.(\d+)\./, '$1.$2.block.$3.'],
  [/^(encoder\.down)_blocks\.(\d+)\.downsamplers\.0\./, '$1.$2.downsample.'],
  [/^(decoder\.up)_blocks\.(\d+)\.upsamplers\.0\./, '$1.$2.upsample.'],
  [/^((?:en|de)coder\.mid)_block\.resnets\.0\./, '$1.block_1.'],
  [/^((?:en|de)coder\.mid)_block\.resnets\.1\./, '$1.block_2.'],
  [/^((?:en|de)coder\.mid)_block\.attentions\.0\.group_norm\./, '$1.attn_1.norm.'],
  [/^((?:en|de)coder\.mid)_block\.attentions\.0\.(?:to_q|query)\./, '$1.attn_1.q.'],
  [/^((?:en|de)coder\.mid)_block\.attentions\.0\.(?:to_k|key)\./, '$1.attn_1.k.'],
  [/^((?:en|de)coder\.mid)_block\.attentions\.0\.(?:to_v|value)\./, '$1.attn_1.v.'],
  [/^((?:en|de)coder\.mid)_block\.attentions\.0\.(?:to_out\.0|proj_attn)\./, '$1.attn_1.proj_out.'],
  [/^((?:en|de)coder\.(?:down|up|mid)\..*)\.conv_shortcut\./, '$1.nin_shortcut.'],
  [/^((?:en|de)coder)\.conv_norm_out\./, '$1.norm_out.'],
];

/** The projections of attention, which diffusers has as linear layers and the official VAE as convolutions. */
const VAE_PROJECTION = /^(?:en|de)coder\.mid\.attn_1\.(?:q|k|v|proj_out)\.weight$/;

/** The weights of a whole VAE by their official names; names that are not diffusers' stay. */
export function officialVae(tensors: Tensors): Map<string, WeightTensor> {
  const lastLevel = lastIndex(tensors, /^(?:encoder\.down|decoder\.up)_blocks\.(\d+)\./);
  return new Map(
    [...tensors].map(([name, weight]) => {
      // diffusers counts the decoder's levels in the order in which they run.
      const counted = name.replace(
        /^decoder\.up_blocks\.(\d+)\./,
        (_, level) => `decoder.up_blocks.${lastLevel - Number(level)}.`,
      );
      const to = vaeNames.reduce((renamed, [from, into]) => renamed.replace(from, into), counted);
      const linear = VAE_PROJECTION.test(to) && weight.shape.length === 2;
      return [to, linear ? { ...weight, shape: [...weight.shape, 1, 1] } : weight];
    }),
  );
}

/** The largest number that stands at the pattern's group, or -1. */
function lastIndex(tensors: Tensors, pattern: RegExp): number {
  let last = -1;
  for (const name of tensors.keys()) last = Math.max(last, Number(pattern.exec(name)?.[1] ?? -1));
  return last;
}

/** Weights of one shape under each other; of different shapes, the first that differs, for the check of shapes. */
function rowsJoined(weights: readonly [WeightTensor, WeightTensor, WeightTensor]): WeightTensor {
  const [first] = weights;
  const odd = weights.find(({ shape }) => shape.join() !== first.shape.join());
  if (odd) return odd;
  const [rows = 0, ...rest] = first.shape;
  return {
    name: first.name,
    shape: [weights.length * rows, ...rest],
    spans: weights.flatMap(({ spans }) => spans),
  };
}

/** The second half of the rows before the first. */
function halvesSwapped(weight: WeightTensor): WeightTensor {
  const { name, shape } = weight;
  const [span] = weight.spans as [Span];
  const [rows = 0, ...rest] = shape;
  // An odd number is wrong, which the check of shapes says.
  if (rows % 2 !== 0) return weight;
  const byteLength = span.byteLength / 2;
  if (isBlockType(span.encoding) && byteLength % blockFormats[span.encoding].bytesPerBlock !== 0) {
    throw new MmditxError(
      'unsupported-model',
      `Tensor ${quote(span.name)} of ${span.source.name} has blocks of ${span.encoding} that cannot be put in the official order; use a .safetensors file of the model.`,
    );
  }
  const half = { ...span, shape: [rows / 2, ...rest], byteLength };
  return { name, shape, spans: [{ ...half, offset: span.offset + byteLength }, half] };
}
