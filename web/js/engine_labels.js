// Shows in the picker of engines what each is: model, recipe, and whether it can be used. Values stay as they are.
import { api } from '../../../scripts/api.js'
import { app } from '../../../scripts/app.js'

const PICKERS = ['FluxFP4LoadEngine', 'FluxFP4EngineManager']
let labels = {}

function learn(definition) {
  const { required, optional } = definition?.input ?? {}
  labels = (required?.engine ?? optional?.engine)?.[1]?.flux_fp4_labels ?? labels
}

async function ask() {
  const response = await api.fetchApi(`/object_info/${PICKERS[0]}`)
  if (response.ok) learn((await response.json())[PICKERS[0]])
}

app.registerExtension({
  name: 'FluxFP4.EngineLabels',

  beforeRegisterNodeDef(_nodeType, definition) {
    if (PICKERS.includes(definition.name)) learn(definition)
  },

  setup() {
    // a run may have built an engine, or made one stale
    for (const kind of ['execution_success', 'execution_interrupted', 'execution_error']) {
      api.addEventListener(kind, ask)
    }
  },

  // the user has pressed R
  refreshComboInNodes: (definitions) => learn(definitions[PICKERS[0]]),

  nodeCreated(node) {
    const picker = PICKERS.includes(node.comfyClass) && node.widgets?.find((widget) => widget.name === 'engine')
    if (picker) picker.options.getOptionLabel = (value) => labels[value] ?? String(value ?? '')
  }
})
