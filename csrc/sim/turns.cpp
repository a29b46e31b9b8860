// The steps of one turn, in the order in which it takes them.
#include <cmath>

#include "sim/simulation.hpp"

namespace dualpath::sim {

void Simulation::begin_turn(std::uint32_t index) {
    Agent& agent = agents_[index];
    if (agent.stage == Stage::kAway) agent.ready_s = now();
    const auto turn = workload_.offsets[agent.trajectory] + agent.turn;
    const bool is_first = agent.turn < 0;
    const std::int64_t append =
        is_first ? workload_.first_tokens[index] : workload_.append_tokens[turn];
    agent.prompt = agent.context + append;
    agent.generated = is_first ? 1 : workload_.generated_tokens[turn];
    agent.stage = Stage::kWaiting;
    ++agent.attempt;
    agent.stay = (std::uint64_t{index} << 32U) + agent.attempt;
    dispatcher_.enqueue({index, agent.stay, request_of(agent), agent.earlier});
}

policy::Request Simulation::request_of(const Agent& agent) const {
    policy::Request request;
    request.num_tokens = agent.prompt;
    request.reserve_tokens = agent.room();
    request.block_tokens = settings_.block_tokens;
    if (!settings_.switches.oracle)
        request.num_hit_blocks = static_cast<std::uint32_t>(agent.stored / settings_.block_tokens);
    return request;
}

void Simulation::place_waiting() {
    while (const auto answer = dispatcher_.next()) {
        if (answer->decision.placed()) {
            start(answer->waiting.agent, answer->decision);
        } else {
            ++recorder_.counts().impossible_turns;
            end_agent(answer->waiting.agent);
        }
    }
}

// Staging memory is taken on the decode side first, then on the prefill side, always in this order.
void Simulation::start(std::uint32_t index, const policy::Decision& decision) {
    Agent& agent = agents_[index];
    agent.decision = decision;
    agent.placed_s = now();
    agent.prefill_open = true;
    agent.unread = dispatcher_.divides_late() ? 0 : decision.segment_bits();
    if (settings_.switches.oracle) return prefill(index);
    agent.stage = Stage::kDecodeStaging;
    const std::int64_t amount = agent.prompt * settings_.kv_bytes_per_token;
    StorageNode& node = cluster_.node(dispatcher_.node_of(decision.decode));
    if (!node.staging().take({index, agent.attempt, amount})) return;
    agent.decode_staging = amount;
    node.note_staging();
    reserve_prefill(index);
}

void Simulation::reserve_prefill(std::uint32_t index) {
    Agent& agent = agents_[index];
    agent.stage = Stage::kPrefillStaging;
    // Not later where what the prefill side reads is what it takes memory for.
    if (!settings_.switches.prefill_stages_all) divide_reads(agent);
    const std::int64_t tokens =
        settings_.switches.prefill_stages_all ? agent.prompt : prefill_read_tokens(agent);
    const std::int64_t amount = tokens * settings_.kv_bytes_per_token;
    StorageNode& node = cluster_.node(dispatcher_.node_of(agent.decision.prefill));
    if (amount > 0 && !node.staging().take({index, agent.attempt, amount})) return;
    agent.prefill_staging = amount;
    node.note_staging();
    read(index);
}

void Simulation::divide_reads(Agent& agent) {
    if (!dispatcher_.divides_late()) return;
    dispatcher_.divide_reads(request_of(agent), agent.decision);
    agent.unread = agent.decision.segment_bits();
}

void Simulation::read(std::uint32_t index) {
    Agent& agent = agents_[index];
    agent.stage = Stage::kReading;
    if (settings_.switches.prefill_stages_all) divide_reads(agent);
    if (agent.unread == 0) return prefill(index);
    const auto segments = agent.decision.segments();
    for (std::uint32_t i = 0; i < segments.size(); ++i) {
        const policy::ReadSegment& segment = segments[i];
        const std::int64_t tokens =
            static_cast<std::int64_t>(segment.num_blocks()) * settings_.block_tokens;
        FifoServer& reads = cluster_.node(segment.node).reads();
        recorder_.counts().read_tokens += static_cast<std::uint64_t>(tokens);
        if (reads.push(now(), {index, agent.attempt, i, bytes(tokens)}))
            schedule_read_end(segment.node);
    }
}

void Simulation::prefill(std::uint32_t index) {
    Agent& agent = agents_[index];
    if (!dispatcher_.arrive(agent.decision, agent.stay)) {
        ++recorder_.counts().evicted_turns;
        return repeat_turn(index);
    }
    agent.stage = Stage::kPrefill;
    agent.staged_s = now();
    const std::int64_t hit = hit_tokens(agent);
    const std::int64_t recomputed =
        static_cast<std::int64_t>(agent.decision.num_recompute_blocks) * settings_.block_tokens;
    const std::int64_t cached =
        static_cast<std::int64_t>(agent.decision.num_cached_blocks) * settings_.block_tokens;
    recorder_.counts().recomputed_tokens += static_cast<std::uint64_t>(recomputed);
    recorder_.counts().cached_tokens += static_cast<std::uint64_t>(cached);
    const Cluster::Seat seat = cluster_.prefill_seat(agent.decision.prefill);
    PrefillGroup& group = cluster_.prefill_group(seat.group);
    group.add(seat.engine, {index, agent.attempt, hit - recomputed, agent.prompt - hit + recomputed,
                            prefill_read_tokens(agent) + cached, cached});
    if (!group.is_stepping()) begin_prefill_step(seat.group);
}

void Simulation::end_prefill(std::uint32_t index) {
    Agent& agent = agents_[index];
    agent.first_token_s = agent.second_token_s = now();
    agent.earlier = {agent.stay,
                     {agent.decision.prefill,
                      static_cast<std::uint32_t>(agent.prompt / settings_.block_tokens)}};
    close_prefill(index, true);
    if (agent.generated == 1) return end_turn(index);
    agent.stage = Stage::kCacheRoom;
    if (cluster_.decode_engine(agent.decision.decode)
            .cache.take({index, agent.attempt, agent.room()}))
        load(index);
}

void Simulation::load(std::uint32_t index) {
    Agent& agent = agents_[index];
    agent.stage = Stage::kLoading;
    if (settings_.switches.oracle) return decode(index);
    FifoServer& loads = cluster_.decode_engine(agent.decision.decode).loads;
    if (const auto end = loads.push(now(), {index, agent.attempt, 0, bytes(agent.prompt)}))
        calendar_.add(*end, EventKind::kCacheLoaded, agent.decision.decode, loads.version());
}

void Simulation::decode(std::uint32_t index) {
    Agent& agent = agents_[index];
    agent.stage = Stage::kDecode;
    release_staging(agent.decode_staging, dispatcher_.node_of(agent.decision.decode));
    const Cluster::Seat seat = cluster_.decode_seat(agent.decision.decode);
    DecodeGroup& group = cluster_.decode_group(seat.group);
    const auto joined = group.join(now(), {0, index, agent.attempt, seat.engine, 0},
                                   agent.generated - 1, agent.prompt + agent.generated / 2);
    agent.second_token_s = joined.second_token_s;
    agent.context_s = joined.context_s;
    schedule_decode_end(seat.group);
}

void Simulation::end_turn(std::uint32_t index) {
    Agent& agent = agents_[index];
    recorder_.end_turn(agent, now());
    close_decode(agent);
    const std::int64_t blocks = agent.room() / settings_.block_tokens;
    const std::int64_t stored = settings_.switches.persist ? blocks * settings_.block_tokens : 0;
    const std::int64_t fresh = stored - agent.stored;
    if (fresh > 0 && !settings_.switches.oracle) {
        cluster_.node(dispatcher_.node_of(agent.decision.decode)).write(bytes(fresh));
        recorder_.counts().persisted_tokens += static_cast<std::uint64_t>(fresh);
    }
    agent.stored = stored;
    agent.context = agent.room();
    agent.stage = Stage::kAway;
    ++agent.attempt;
    ++agent.turn;
    const auto last = workload_.offsets[agent.trajectory + 1] - workload_.offsets[agent.trajectory];
    if (agent.turn >= last) return end_agent(index);
    const double pause = pause_s(index);
    if (pause <= 0) return begin_turn(index);
    calendar_.add(now() + pause, EventKind::kTurnBegins, index);
}

void Simulation::end_agent(std::uint32_t index) {
    Agent& agent = agents_[index];
    if (agent.stage == Stage::kAway) recorder_.end_agent(index, workload_.arrival_s[index], now());
    agent.stage = Stage::kDone;
    --num_open_;
}

// The prefill engine's share of a placed request is over.
void Simulation::close_prefill(std::uint32_t index, bool is_done) {
    Agent& agent = agents_[index];
    const std::int64_t known =
        settings_.switches.oracle
            ? 0
            : hit_tokens(agent) - static_cast<std::int64_t>(agent.decision.num_recompute_blocks) *
                                      settings_.block_tokens;
    dispatcher_.end_prefill(agent.decision, agent.stay, agent.prompt, agent.prompt - known,
                            is_done);
    agent.prefill_open = false;
    release_staging(agent.prefill_staging, dispatcher_.node_of(agent.decision.prefill));
}

// The decode engine's share is over.
void Simulation::close_decode(Agent& agent) {
    dispatcher_.end_decode(agent.decision, agent.prompt, agent.room());
    release_staging(agent.decode_staging, dispatcher_.node_of(agent.decision.decode));
    if (agent.stage != Stage::kLoading && agent.stage != Stage::kDecode) return;
    cluster_.decode_engine(agent.decision.decode).cache.give_back(agent.room());
    grant_cache(agent.decision.decode);
}

void Simulation::release_staging(std::int64_t& held, std::uint32_t node) {
    if (held == 0) return;
    cluster_.node(node).staging().give_back(held);
    held = 0;
    grant_staging(node);
}

void Simulation::grant_staging(std::uint32_t index) {
    MemoryPool& staging = cluster_.node(index).staging();
    while (staging.anyone_waits()) {
        const MemoryPool::Waiting head = staging.head();
        const bool live = is_live(head.agent, head.attempt);
        if (live && !staging.can_grant()) return;
        staging.grant(live);
        if (!live) continue;
        cluster_.node(index).note_staging();
        Agent& agent = agents_[head.agent];
        if (agent.stage == Stage::kDecodeStaging) {
            agent.decode_staging = head.amount;
            reserve_prefill(head.agent);
        } else {
            agent.prefill_staging = head.amount;
            read(head.agent);
        }
    }
}

void Simulation::grant_cache(std::uint32_t engine) {
    MemoryPool& cache = cluster_.decode_engine(engine).cache;
    while (cache.anyone_waits()) {
        const MemoryPool::Waiting head = cache.head();
        const bool live = is_live(head.agent, head.attempt);
        if (live && !cache.can_grant()) return;
        cache.grant(live);
        if (live) load(head.agent);
    }
}

std::int64_t Simulation::prefill_read_tokens(const Agent& agent) const {
    const std::uint32_t node = agent.decision.prefill == policy::kNone
                                   ? policy::kNone
                                   : dispatcher_.node_of(agent.decision.prefill);
    std::int64_t blocks = 0;
    for (const policy::ReadSegment& segment : agent.decision.segments())
        if (segment.node == node) blocks += segment.num_blocks();
    return blocks * settings_.block_tokens;
}

// Exponential, from the seed, the agent and the turn alone: the same in every mode that is
// compared.
double Simulation::pause_s(std::uint32_t index) const {
    if (settings_.tool_time_s <= 0) return 0;
    std::uint64_t bits = settings_.seed * 0x9E3779B97F4A7C15U + index * 0xD1B54A32D192ED03U +
                         static_cast<std::uint64_t>(agents_[index].turn) * 0x8CB92BA72F3D8DD7U;
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9U;
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBU;
    bits ^= bits >> 31;
    const double uniform = (static_cast<double>(bits >> 11) + 0.5) * 0x1p-53;
    return -settings_.tool_time_s * std::log(uniform);
}

}  // namespace dualpath::sim
