// Shows in the picker of engines what each is: model, recipe, and whether it can be used. Values stay as they are.
import { api } from '../../../scripts/api.js'
import { app } from '../../../scripts/app.js'

const PICKERS = ['FluxFP4LoadEngine', 'FluxFP4EngineManager']
let labels = {}

async function refresh() {
  const response = await api.fetchApi('/flux_fp4/engine_labels')
  if (response.ok) labels = await response.json()
}

app.registerExtension({
  name: 'FluxFP4.EngineLabels',

  async setup() {
    await refresh()
    // a run may have built an engine, or made one stale
    for (const kind of ['execution_success', 'execution_interrupted', 'execution_error']) {
      api.addEventListener(kind, refresh)
    }
  },

  // the user has pressed R
  refreshComboInNodes: refresh,

  nodeCreated(node) {
    const picker = PICKERS.includes(node.comfyClass) && node.widgets?.find((widget) => widget.name === 'engine')
    if (picker) picker.options.getOptionLabel = (value) => labels[value] ?? String(value ?? '')
  }
})
