/**
 * What a checkpoint says about itself beside its tensors: the few figures that shapes cannot tell, and tokenizers.
 * Released files say nothing; their figures are the family's constants.
 *
 * | key | value |
 * |---|---|
 * | `mmditx.config` | JSON of `ConfigHints` |
 * | `mmditx.tokenizer.clip`, `mmditx.tokenizer.t5` | the text of a tokenizer.json |
 * | `oracle.mmdit`, `oracle.clip_l`, `oracle.clip_g`, `oracle.vocab` | the same figures in the reference models of our tests |
 */
import { z } from 'zod';
import { MmditxError } from '../errors.ts';
import type { ClipConfig, T5Config, TransformerConfig, VaeConfig } from '../models/config.ts';
import { parseJson } from './json.ts';

const count = z.int().positive();
const token = z.int().nonnegative();
const activation = z.enum(['quick_gelu', 'gelu']);

const clipHints = z.object({ heads: count, activation, bosId: token, eosId: token, padId: token }).partial();

const hintsSchema = z
  .object({
    transformer: z.object({ heads: count }).partial(),
    vae: z.object({ groups: count, latentScale: z.number().positive(), latentShift: z.number() }).partial(),
    clipL: clipHints,
    clipG: clipHints,
    t5: z.object({ tokens: count, maxDistance: count }).partial(),
  })
  .partial();

/** Figures of the configurations that no tensor's shape tells. */
export type ConfigHints = z.infer<typeof hintsSchema>;
export type ClipHints = z.infer<typeof clipHints>;

export const CONFIG_KEY = 'mmditx.config';
export const CLIP_TOKENIZER_KEY = 'mmditx.tokenizer.clip';
export const T5_TOKENIZER_KEY = 'mmditx.tokenizer.t5';

const referenceTransformer = z.object({ heads: count });
const referenceClip = z.object({ hidden_act: activation, num_attention_heads: count });
const referenceVocabulary = z.object({ bos: token, eos: token });

/**
 * The figures a file's metadata states.
 * @throws MmditxError `bad-file` when an entry is not what its key promises.
 */
export function readHints(metadata: Readonly<Record<string, string>>, file: string): ConfigHints {
  const read = <T>(key: string, schema: z.ZodType<T>): T | undefined => {
    const text = metadata[key];
    if (text === undefined) return undefined;
    const refuse = (fault: string) =>
      new MmditxError(
        'bad-file',
        `The metadata entry ${key} of ${file} ${fault}; save the file again or remove the entry.`,
      );
    const parsed = schema.safeParse(parseJson(text, refuse));
    if (parsed.success) return parsed.data;
    const issue = parsed.error.issues[0];
    const where = issue?.path.length ? ` at ${issue.path.join('.')}` : '';
    throw refuse(`is wrong${where} (${issue?.message ?? 'unknown'})`);
  };

  const own = read(CONFIG_KEY, hintsSchema);
  if (own) return own;
  const vocabulary = read('oracle.vocab', referenceVocabulary);
  const readClip = (key: string): ClipHints | undefined => {
    const clip = read(key, referenceClip);
    return (
      clip && {
        heads: clip.num_attention_heads,
        activation: clip.hidden_act,
        bosId: vocabulary?.bos,
        eosId: vocabulary?.eos,
      }
    );
  };
  return {
    transformer: read('oracle.mmdit', referenceTransformer),
    clipL: readClip('oracle.clip_l'),
    clipG: readClip('oracle.clip_g'),
  };
}

/** The metadata entry from which `readHints` restores what the shapes of these networks do not tell. */
export function configMetadata(configs: {
  readonly transformer?: TransformerConfig | undefined;
  readonly vae?: VaeConfig | undefined;
  readonly clipL?: ClipConfig | undefined;
  readonly clipG?: ClipConfig | undefined;
  readonly t5?: T5Config | undefined;
}): Record<string, string> {
  // The schema of a plain object drops what it does not name.
  return { [CONFIG_KEY]: JSON.stringify(hintsSchema.parse(configs)) };
}
