/**
 * The tensors each network is made of: name (without the file's prefix) to shape, in the layout of the official
 * single file (SD3.5) and of the encoders' own files (transformers). Linear weights are [out, in], convolutions
 * [out, in, height, width].
 */
import type { ClipConfig, T5Config, TransformerConfig, VaeConfig } from '../models/config.ts';

export type TensorShapes = ReadonlyMap<string, readonly number[]>;

type MutableShapes = Map<string, readonly number[]>;

function linear(shapes: MutableShapes, name: string, outputs: number, inputs: number): void {
  shapes.set(`${name}.weight`, [outputs, inputs]);
  shapes.set(`${name}.bias`, [outputs]);
}

function convolution(shapes: MutableShapes, name: string, outputs: number, inputs: number, side: number): void {
  shapes.set(`${name}.weight`, [outputs, inputs, side, side]);
  shapes.set(`${name}.bias`, [outputs]);
}

/** Weight and bias of a LayerNorm or GroupNorm. */
function norm(shapes: MutableShapes, name: string, width: number): void {
  shapes.set(`${name}.weight`, [width]);
  shapes.set(`${name}.bias`, [width]);
}

/** Chunks of a block's modulation: shift, scale and gate of each sublayer; shift and scale where nothing is added. */
export const modulationChunks = { dual: 9, plain: 6, last: 2 } as const;

export function transformerTensors(config: TransformerConfig): TensorShapes {
  const { hiddenSize: width, depth, headDim, mlpHidden, patchSize, qkNorm } = config;
  const shapes: MutableShapes = new Map();
  shapes.set('pos_embed', [1, config.tableSize ** 2, width]);
  convolution(shapes, 'x_embedder.proj', width, config.inChannels, patchSize);
  linear(shapes, 't_embedder.mlp.0', width, config.timestepWidth);
  linear(shapes, 't_embedder.mlp.2', width, width);
  linear(shapes, 'y_embedder.mlp.0', width, config.pooledWidth);
  linear(shapes, 'y_embedder.mlp.2', width, width);
  linear(shapes, 'context_embedder', width, config.contextWidth);

  const queriesKeysValues = (name: string) => {
    linear(shapes, `${name}.qkv`, 3 * width, width);
    if (!qkNorm) return;
    shapes.set(`${name}.ln_q.weight`, [headDim]);
    shapes.set(`${name}.ln_k.weight`, [headDim]);
  };
  const stream = (name: string, chunks: number) => {
    linear(shapes, `${name}.adaLN_modulation.1`, chunks * width, width);
    queriesKeysValues(`${name}.attn`);
    // The last block reads the context and does not write it.
    if (chunks === modulationChunks.last) return;
    linear(shapes, `${name}.attn.proj`, width, width);
    linear(shapes, `${name}.mlp.fc1`, mlpHidden, width);
    linear(shapes, `${name}.mlp.fc2`, width, mlpHidden);
  };
  for (let block = 0; block < depth; block++) {
    const dual = config.dualAttentionLayers.includes(block);
    stream(`joint_blocks.${block}.x_block`, dual ? modulationChunks.dual : modulationChunks.plain);
    if (dual) {
      queriesKeysValues(`joint_blocks.${block}.x_block.attn2`);
      linear(shapes, `joint_blocks.${block}.x_block.attn2.proj`, width, width);
    }
    const last = block === depth - 1;
    stream(`joint_blocks.${block}.context_block`, last ? modulationChunks.last : modulationChunks.plain);
  }

  linear(shapes, 'final_layer.adaLN_modulation.1', modulationChunks.last * width, width);
  linear(shapes, 'final_layer.linear', patchSize ** 2 * config.outChannels, width);
  return shapes;
}

export function vaeTensors(config: VaeConfig): TensorShapes {
  const { channels, multipliers, resBlocks, latentChannels, imageChannels } = config;
  const widths = multipliers.map((multiplier) => multiplier * channels);
  const top = widths.at(-1)!;
  const shapes: MutableShapes = new Map();

  const resBlock = (name: string, inputs: number, outputs: number) => {
    norm(shapes, `${name}.norm1`, inputs);
    convolution(shapes, `${name}.conv1`, outputs, inputs, 3);
    norm(shapes, `${name}.norm2`, outputs);
    convolution(shapes, `${name}.conv2`, outputs, outputs, 3);
    if (inputs !== outputs) convolution(shapes, `${name}.nin_shortcut`, outputs, inputs, 1);
  };
  const middle = (name: string) => {
    resBlock(`${name}.block_1`, top, top);
    norm(shapes, `${name}.attn_1.norm`, top);
    for (const projection of ['q', 'k', 'v', 'proj_out']) {
      convolution(shapes, `${name}.attn_1.${projection}`, top, top, 1);
    }
    resBlock(`${name}.block_2`, top, top);
  };

  convolution(shapes, 'encoder.conv_in', channels, imageChannels, 3);
  widths.forEach((width, level) => {
    for (let block = 0; block < resBlocks; block++) {
      const inputs = block > 0 ? width : level > 0 ? widths[level - 1]! : channels;
      resBlock(`encoder.down.${level}.block.${block}`, inputs, width);
    }
    if (level < widths.length - 1) {
      convolution(shapes, `encoder.down.${level}.downsample.conv`, width, width, 3);
    }
  });
  middle('encoder.mid');
  norm(shapes, 'encoder.norm_out', top);
  // Mean and log-variance.
  convolution(shapes, 'encoder.conv_out', 2 * latentChannels, top, 3);

  convolution(shapes, 'decoder.conv_in', top, latentChannels, 3);
  middle('decoder.mid');
  widths.forEach((width, level) => {
    for (let block = 0; block <= resBlocks; block++) {
      // The decoder runs from the last level to the first.
      const inputs = block > 0 ? width : (widths[level + 1] ?? top);
      resBlock(`decoder.up.${level}.block.${block}`, inputs, width);
    }
    if (level > 0) convolution(shapes, `decoder.up.${level}.upsample.conv`, width, width, 3);
  });
  norm(shapes, 'decoder.norm_out', widths[0]!);
  convolution(shapes, 'decoder.conv_out', imageChannels, widths[0]!, 3);
  return shapes;
}

export function clipTensors(config: ClipConfig): TensorShapes {
  const { width, mlpWidth } = config;
  const shapes: MutableShapes = new Map();
  shapes.set('text_model.embeddings.token_embedding.weight', [config.vocabSize, width]);
  shapes.set('text_model.embeddings.position_embedding.weight', [config.positions, width]);
  for (let layer = 0; layer < config.layers; layer++) {
    const name = `text_model.encoder.layers.${layer}`;
    norm(shapes, `${name}.layer_norm1`, width);
    for (const projection of ['q', 'k', 'v', 'out']) {
      linear(shapes, `${name}.self_attn.${projection}_proj`, width, width);
    }
    norm(shapes, `${name}.layer_norm2`, width);
    linear(shapes, `${name}.mlp.fc1`, mlpWidth, width);
    linear(shapes, `${name}.mlp.fc2`, width, mlpWidth);
  }
  norm(shapes, 'text_model.final_layer_norm', width);
  if (config.projection) shapes.set('text_projection.weight', [config.pooledWidth, width]);
  return shapes;
}

export function t5Tensors(config: T5Config): TensorShapes {
  const { width, mlpWidth } = config;
  const inner = config.heads * config.headDim;
  const shapes: MutableShapes = new Map();
  shapes.set('shared.weight', [config.vocabSize, width]);
  // All blocks share the first one's bias.
  shapes.set('encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight', [config.buckets, config.heads]);
  for (let block = 0; block < config.layers; block++) {
    const attention = `encoder.block.${block}.layer.0`;
    shapes.set(`${attention}.layer_norm.weight`, [width]);
    for (const projection of ['q', 'k', 'v']) {
      shapes.set(`${attention}.SelfAttention.${projection}.weight`, [inner, width]);
    }
    shapes.set(`${attention}.SelfAttention.o.weight`, [width, inner]);
    const feedForward = `encoder.block.${block}.layer.1`;
    shapes.set(`${feedForward}.layer_norm.weight`, [width]);
    shapes.set(`${feedForward}.DenseReluDense.wi_0.weight`, [mlpWidth, width]);
    shapes.set(`${feedForward}.DenseReluDense.wi_1.weight`, [mlpWidth, width]);
    shapes.set(`${feedForward}.DenseReluDense.wo.weight`, [width, mlpWidth]);
  }
  shapes.set('encoder.final_layer_norm.weight', [width]);
  return shapes;
}
